"""A pipeline of diffusers for classes, small images that are enlarged, and variances that the network predicts.

    from diffusers import DDIMScheduler, DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    pipe(batch_size=4, class_labels=[0, 1, 2, 3]).images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # or another that takes whole timesteps
    pipe(batch_size=4, class_labels=[0, 1, 2, 3], num_inference_steps=50, use_clipped_model_output=True).images

low_res are the images to enlarge, [batch_size, C, h, w] in [-1, 1]. Further arguments are the scheduler's, for `step`.
"""

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.models.attention_processor import Attention
from diffusers.utils.torch_utils import randn_tensor


class PixelPipeline(DiffusionPipeline):
    def __init__(self, unet, scheduler, image_channels: int = 0):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(image_channels=image_channels or unet.config.in_channels)
        # UNet2DModel has one size of heads for all widths. A negative one stands for this number of heads instead.
        if (heads := -unet.config.attention_head_dim) > 0:
            for block in (module for module in unet.modules() if isinstance(module, Attention)):
                block.heads, block.scale = heads, (block.inner_dim // heads) ** -0.5

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        class_labels=None,
        low_res=None,
        generator=None,
        num_inference_steps=None,
        output_type="pil",
        return_dict=True,
        **arguments,
    ):
        device, dtype, config = self._execution_device, self.unet.dtype, self.unet.config
        size = config.sample_size if not isinstance(config.sample_size, int) else [config.sample_size] * 2
        shape = (batch_size, self.config.image_channels, *size)
        image = randn_tensor(shape, generator=generator, device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=device).expand(batch_size)
        if low_res is not None:
            low_res = low_res.to(device, dtype)
            low_res = torch.nn.functional.interpolate(low_res, tuple(size), mode="bilinear", align_corners=False)
        self.scheduler.set_timesteps(num_inference_steps or self.scheduler.config.num_train_timesteps)
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.scale_model_input(image, t)
            output = self.unet(x if low_res is None else torch.cat([x, low_res], dim=1), t, labels).sample
            if not isinstance(self.scheduler, DDPMScheduler):  # no other one uses the variances
                output = output[:, : shape[1]]
            image = self.scheduler.step(output, t, image, generator=generator, **arguments).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).float().numpy()
            image = self.numpy_to_pil(image) if output_type == "pil" else image
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
