"""What other programs call a setting: leads from their words to ours, with how to convert a value where units differ.

The words are those of diffusers' and accelerate's scripts, EDM, guided-diffusion, the Trainers of Transformers and
lucidrains, Lightning, and PyTorch's examples, and of the evaluators of guided-diffusion, EDM and StyleGAN, pytorch-fid,
clean-fid and torch-fidelity. This module imports no PyTorch. It is mostly the table of words, hence its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from fastdiff.errors import did_you_mean

_NAMES = re.compile(r"\{(\w+)\}")

_TABLE: tuple[tuple[str, ...], ...] = (
    # (words, advice, other advice, …): the first advice counts whose {names} the script has.
    # --- data ---
    (
        "data dataset datasets dataset_dir dataset_path train_data_dir train_dir traindir train_data data_path "
        "data_root dataroot datadir data_folder root root_dir train_folder train_path instance_data_dir",
        "{data_dir}",
        "{source}",
        "{base_samples}",
        "{lmdb}",
        "{archive}",
        "{reference}",
    ),
    (
        "image_dir images_dir image_folder image_path images img_dir imagefolder input input_dir folder source "
        "source_dir",
        "{data_dir}",
        "{source}",
        "{base_samples}",
        "{lmdb}",
        "{archive}",
        "{samples}",
    ),
    (
        "dataset_name hf_dataset dataset_config_name",
        "data sets are folders of images: give {data_dir}",
        "statistics are not looked up by a name: give images or a file of statistics as {reference}",
    ),
    ("lr_images low_res low_res_dir base_images small_images", "{base_samples}"),
    (
        "resolution res img_size imgsize image_resolution input_size target_size target_resolution imsize image_size",
        "the images have the checkpoint's size: leave it out, for {model_path} says it",
        "{image_size}",
        "did you mean {large_size}, with {small_size} for the images that go in?",
        "{size}",
    ),
    ("large_size small_size", "super-resolution models are for super_res_train.py and super_res_sample.py"),
    ("scale upscale scale_factor sr_factor", "the factor is that of {large_size} to {small_size}"),
    (
        "augment augmentation aug xflip hflip flip mirror horizontal_flip random_horizontal_flip "
        "augment_horizontal_flip use_augment",
        "images can be mirrored and cropped at random: give {random_flip} True or {random_crop} True",
    ),
    (
        "center_crop centre_crop crop resize",
        "images keep their size; {resize} 64 resizes them and crops them to their centre",
        "images are resized and cropped to their centre unless {random_crop} True is given: leave it out",
        "images are always resized and cropped to their centre: leave it out",
    ),
    (
        "workers dataloader_num_workers num_dataloader_workers dataloader_workers n_workers nworkers num_worker "
        "data_workers loader_workers num_threads n_cpu j num_workers",
        "{num_workers}",
        "{workers}",
        "a fixed number of threads reads the images ahead: leave it out; {loader} chooses what decodes them",
    ),
    # --- classes ---
    ("cond conditional class_conditional class_condition use_labels conditioned", "did you mean {class_cond} True?"),
    ("n_classes num_class nb_classes n_class nclasses label_dim num_labels y_dim", "{num_classes}"),
    ("classes", "did you mean {class_cond} True, and {num_classes}?"),
    ("class class_label class_labels class_idx class_id label labels y target_class class_names", "{classes}"),
    (
        "class_dropout class_dropout_prob label_drop_prob label_dropout_prob drop_label_prob cond_drop_prob p_uncond "
        "uncond_prob cfg_dropout uncond_p puncond",
        "{label_dropout}",
    ),
    # --- the network ---
    (
        "dim base_dim hidden_dim unet_dim base_channels model_channels n_channels num_channel num_filters ngf ch "
        "cbase width block_out_channels num_channels",
        "{num_channels}",
        "{classifier_width}",
    ),
    (
        "dim_mults ch_mult ch_mults channel_mults channel_multiplier channel_multipliers cres channel_mult",
        "{channel_mult}",
        "{classifier_channel_mult}",
    ),
    ("channels image_channels num_image_channels in_ch img_channels nc input_channels", "{in_channels}"),
    (
        "layers_per_block num_blocks n_res_blocks res_blocks num_resblocks num_res_block num_res_blocks",
        "{num_res_blocks}",
        "{classifier_depth}",
    ),
    (
        "attn_resolutions attn_res attention_levels attention_resolution attention_resolutions",
        "{attention_resolutions}",
        "{classifier_attention_resolutions}",
    ),
    ("heads n_heads num_attention_heads attention_heads n_head", "{num_heads}"),
    ("head_dim dim_head attention_head_dim", "{num_head_channels}"),
    (
        "gradient_checkpointing use_gradient_checkpointing grad_checkpointing grad_checkpoint "
        "activation_checkpointing checkpoint_activations",
        "did you mean {use_checkpoint} True?",
    ),
    (
        "enable_xformers_memory_efficient_attention xformers use_xformers flash_attn flash_attention use_flash_attn "
        "use_flash_attention attention_backend",
        "the fastest attention is chosen without a flag: leave it out",
    ),
    # --- the process and the loss ---
    (
        "timesteps num_timesteps n_timesteps num_train_timesteps ddpm_num_steps diffusion_timesteps n_t t "
        "num_diffusion_timesteps num_diffusion_steps noise_steps",
        "did you mean {steps}, with a {solver}?",
        "{diffusion_steps}",
    ),
    ("beta_schedule ddpm_beta_schedule betas_schedule schedule noise_scheduler", "{noise_schedule}"),
    (
        "prediction_type objective parameterization predict_epsilon pred_type predict_x0",
        "{predict_xstart} True predicts x_0 and False the noise; there is no other prediction",
    ),
    (
        "loss loss_type loss_fn",
        "the loss is the squared error, with {learn_sigma} True the hybrid one, with {use_kl} True the bound",
    ),
    ("snr_gamma min_snr min_snr_loss_weight minsnr_gamma", "{min_snr_gamma}"),
    # --- steps and batches ---
    (
        "epochs epoch num_epochs n_epochs nepochs num_train_epochs max_epochs train_epochs total_epochs",
        "a run is counted in steps: give {max_steps} = epochs x images / {batch_size}",
    ),
    (
        "duration kimg mimg total_kimg total_images num_images_to_train",
        "a run is counted in steps: give {max_steps} = images / {batch_size}",
    ),
    (
        "max_train_steps num_train_steps train_num_steps train_steps training_steps total_steps "
        "total_train_steps num_training_steps max_iter max_iters max_iterations iters iterations num_iterations "
        "num_iters total_iters total_iterations n_iter n_iters niter",
        "{max_steps}",
    ),
    ("num_steps n_steps steps", "{max_steps}", "{steps}"),
    (
        "batch train_batch_size bs b batchsize batch_sz n_batch global_batch_size total_batch_size "
        "effective_batch_size train_bs minibatch_size",
        "did you mean {batch_size}? It counts the images of a step over all processes; {microbatch} is what one "
        "computes at once",
        "{batch_size}",
    ),
    (
        "per_device_train_batch_size per_device_batch_size per_gpu_batch_size per_gpu_train_batch_size batch_gpu "
        "batch_size_per_gpu batch_size_per_device train_micro_batch_size_per_gpu micro_batch_size device_batch_size "
        "local_batch_size",
        "{batch_size} = images per device x devices x accumulated ones, and {microbatch} is what a device computes at "
        "once",
        "{batch_size}",
    ),
    ("eval_batch_size sample_batch_size test_batch_size per_device_eval_batch_size val_batch_size", "{batch_size}"),
    (
        "gradient_accumulation_steps gradient_accumulate_every gradient_accumulation grad_accum grad_accumulation "
        "grad_accum_steps accumulate_grad_batches accumulation_steps accum_iter accum_steps accumulate",
        "gradients are accumulated where {microbatch} is smaller than a process's share of {batch_size}: give "
        "microbatch = batch_size / processes / accumulation steps",
    ),
    # --- the optimiser ---
    ("learning_rate learningrate lrate train_lr base_lr max_lr peak_lr blr init_lr", "{lr}"),
    (
        "lr_scheduler lr_scheduler_type lr_schedule lr_decay lr_policy decay_lr lr_decay_steps lr_annealing lr_anneal "
        "anneal_lr cosine_decay",
        "the learning rate is constant; {lr_anneal_steps} lets it fall linearly to 0, {lr_warmup_steps} rise at the "
        "start",
    ),
    (
        "scheduler",
        "{solver}",
        "the learning rate is constant; {lr_anneal_steps} lets it fall linearly to 0, {lr_warmup_steps} rise at the "
        "start",
    ),
    ("warmup warmup_steps num_warmup_steps n_warmup lr_warmup lr_rampup warmup_iters", "{lr_warmup_steps}"),
    (
        "warmup_ratio warmup_epochs lr_rampup_kimg",
        "{lr_warmup_steps} counts steps: a ratio x {max_steps}, or images / {batch_size}",
    ),
    ("wd adam_weight_decay l2 weightdecay decay_weight", "{weight_decay}"),
    (
        "optimizer optim optimizer_type adam_beta1 adam_beta2 beta1 beta2 betas adam_epsilon adam_eps momentum "
        "use_8bit_adam adam_betas",
        "the optimiser is AdamW with betas 0.9 and 0.999; it has {lr} and {weight_decay}",
    ),
    (
        "max_grad_norm grad_norm clip_grad clip_grad_norm grad_clip_norm gradient_clip gradient_clip_val "
        "gradient_clipping clip clip_norm max_norm grad_clip_value clip_gradient",
        "{grad_clip}",
    ),
    (
        "ema_decay ema_beta ema_max_decay ema_rates ema_decay_rate ema_momentum decay",
        "did you mean {ema_rate}? It takes several as well, such as 0.9999,0.999",
    ),
    (
        "ema ema_halflife ema_half_life ema_halflife_kimg",
        "did you mean {ema_rate}, the decay of one step, such as 0.9999? A half-life of so many images is 0.5 ** "
        "(batch_size / images)",
    ),
    (
        "use_ema ema_inv_gamma ema_power ema_update_every ema_start ema_warmup step_start_ema update_ema_every",
        "averages of the weights are always kept: leave it out; {ema_rate} is their decay",
        "a folder's newest average is drawn from: leave it out; {model_path} may name another file",
    ),
    # --- precision and speed ---
    ("mixed_precision amp dtype weight_dtype use_amp half", "did you mean {precision}: fp32 (for no), bf16 or fp16?"),
    ("fp16 float16 half_precision", "did you mean {precision} fp16?"),
    ("bf16 bfloat16 use_bf16", "did you mean {precision} bf16?"),
    ("fp32 float32 full_precision no_fp16", "did you mean {precision} fp32?"),
    ("tf32 use_tf32 enable_tf32", "did you mean {allow_tf32} True?"),
    ("torch_compile use_compile compile_model use_torch_compile", "{compile}"),
    ("zero stage deepspeed_stage zero_optimization_stage zero_optimization", "{zero_stage}"),
    ("deepspeed_config ds_config deepspeed_config_file", "{deepspeed}"),
    (
        "gpus gpu gpu_ids n_gpu n_gpus ngpu ngpus num_gpus devices num_devices nproc nproc_per_node num_processes "
        "num_machines num_nodes nnodes nodes world_size rank dist_url dist_backend multiprocessing_distributed "
        "distributed strategy accelerator multi_gpu parallel ddp",
        "the launcher says where to run: deepspeed --num_gpus N SCRIPT, or torchrun --nproc_per_node N SCRIPT",
    ),
    (
        "device cuda use_cuda no_cuda use_gpu use_cpu cpu",
        "a GPU is used where there is one: leave it out; the environment variable CUDA_VISIBLE_DEVICES chooses, empty "
        "for the CPU",
    ),
    # --- folders, checkpoints, logs ---
    (
        "output_dir outdir out output out_path output_path output_folder save_dir save_path savedir results_dir "
        "results result_dir results_folder logdir log_dir default_root_dir workdir work_dir exp_dir experiment_dir "
        "out_folder",
        "{run_dir}",
        "did you mean {results_dir} for the results, or {out_dir} for the images?",
        "{out_dir}",
        "{out}",
    ),
    ("sample_dir samples_dir", "{run_dir}", "{samples}", "{out_dir}", "{out}"),
    ("checkpoint_dir checkpoints_dir ckpt_dir model_dir", "{model_path}", "{run_dir}"),
    (
        "logging_dir tensorboard_dir tb_dir report_to logger wandb use_wandb wandb_project tensorboard tracker "
        "tracker_name",
        "the curves are in progress.csv and TensorBoard's files in {run_dir}: leave it out",
    ),
    ("run_name experiment_name exp_name expname project_name experiment desc exp", "{name}"),
    (
        "overwrite_output_dir force overwrite",
        "a run is never written over: give another {run_dir} for a new one, the same to resume",
        "{overwrite}",
    ),
    (
        "pretrained pretrained_model pretrained_model_name_or_path pretrained_path transfer finetune fine_tune "
        "finetune_from init_checkpoint init_weights init_from_checkpoint",
        "{init_from}",
        "{model_path}",
        "did you mean {resume_checkpoint}?",
    ),
    (
        "resume resume_from resume_from_checkpoint resume_path resume_run resume_ckpt resume_training auto_resume "
        "continue continue_train restore reload",
        "the same {run_dir} resumes by itself; {resume_checkpoint} starts from a checkpoint elsewhere",
        "the same command goes on in the same {out_dir}: leave it out",
    ),
    (
        "checkpoint ckpt ckpt_path checkpoint_path load load_checkpoint load_path load_from model weights "
        "weights_path model_file model_ckpt model_checkpoint network network_pkl pkl from_checkpoint unet_path "
        "model_name_or_path",
        "{model_path}",
        "did you mean {resume_checkpoint}? The same {run_dir} resumes by itself",
    ),
    (
        "save_steps save_every save_freq save_frequency save_interval_steps save_model_steps checkpointing_steps "
        "checkpoint_steps checkpoint_every checkpoint_interval checkpoint_freq ckpt_every ckpt_interval ckpt_freq "
        "snapshot_interval snap dump save_every_n_steps every_n_train_steps checkpoint_frequency",
        "did you mean {save_interval}? It counts steps, or minutes as in 30min",
    ),
    (
        "save_model_epochs save_epochs save_every_epoch checkpointing_epochs",
        "{save_interval} counts steps (epochs x images / batch_size), or minutes as in 30min",
    ),
    (
        "checkpoints_total_limit save_total_limit max_checkpoints keep_checkpoints max_to_keep save_top_k keep_last_n",
        "{keep_last}",
    ),
    (
        "save_and_sample_every",
        "did you mean {save_interval} for checkpoints, and {sample_interval} for grids of samples, both in steps?",
    ),
    (
        "save_images_epochs validation_epochs eval_epochs sample_epochs",
        "{sample_interval} counts steps (epochs x images / batch_size) between grids of samples",
    ),
    (
        "save_images_steps sample_every sample_freq sample_frequency image_every image_interval preview_interval "
        "vis_every",
        "did you mean {sample_interval}, the steps between grids of samples?",
    ),
    (
        "validation_steps eval_steps eval_every eval_freq",
        "did you mean {sample_interval}, the steps between grids of samples, or {eval_interval}, those between scores?",
    ),
    (
        "logging_steps log_every log_every_n_steps log_freq log_frequency log_steps logging_interval print_freq "
        "print_every print_interval tick p",
        "{log_interval}",
    ),
    ("random_seed manual_seed global_seed rng_seed set_seed", "{seed}"),
    ("seeds", "{num_samples} images are drawn from one {seed}", "{seed}"),
    ("fast_dev_run dryrun", "{dry_run}"),
    ("cfg_file config_file config_path conf yaml json config_name", "{config}"),
    ("push_to_hub hub_token hub_model_id hub_private_repo", "nothing is uploaded: leave it out"),
    # --- drawing ---
    (
        "num_samples n_samples n_sample nsamples num_sample num_images n_images n_imgs num_imgs num_fid_samples "
        "samples number_of_samples num_generate num_images_per_prompt num_validation_images count",
        "{num_samples}",
        "did you mean {n}, the first argument?",
        "did you mean {sample_count}, the images of a grid?",
    ),
    (
        "num_inference_steps ddpm_num_inference_steps inference_steps sampling_steps num_sampling_steps sample_steps "
        "num_sample_steps ddim_steps sampling_timesteps n_inference_steps denoising_steps nfe",
        "did you mean {steps}, with a {solver}?",
        "grids of samples take {sample_respacing}, such as ddim25",
    ),
    ("timestep_respacing respacing sr_timestep_respacing", "did you mean {steps}, with a {solver}?"),
    ("sampler sampler_name sampler_type sampling_method sample_method method", "{solver}"),
    ("ddim use_ddim", "did you mean {solver} ddim?"),
    ("ddim_eta ddim_sampling_eta", "{eta}"),
    (
        "cfg cfg_scale guidance_scale guidance_weight guidance_strength cond_scale unconditional_guidance_scale "
        "classifier_free_guidance w cfg_w",
        "did you mean {guidance}? 1 means none; add 1 to a weight for which 0 means none",
        "{config}",
    ),
    ("use_classifier classifier classifier_guidance", "{classifier_path}"),
    ("gradient_scale cg_scale classifier_weight", "{classifier_scale}"),
    ("save_format format image_format", "{save_as}"),
    ("grid nrow n_rows grid_size", "{grid_images}"),
    # --- evaluation ---
    (
        "sample_batch sample_path sample_npz samples_path input1 path path1 fdir1 gen_dir gen_path gen_images "
        "generated generated_dir generated_path generated_images fake fake_dir fake_path fake_images eval_dir",
        "{samples}",
    ),
    (
        "ref ref_batch ref_dir ref_path ref_npz ref_stats reference_batch reference_dir reference_path "
        "reference_stats input2 path2 fdir2 gt gt_dir gt_path real real_dir real_path real_images stats stats_path "
        "fid_ref fid_stats fid_stats_path fid_statistics fid_statistics_file precomputed_stats dataset_stats",
        "{reference}",
    ),
    (
        "save_stats make_stats compute_stats make_custom_stats dest stats_out out_stats custom_name input2_cache_name",
        "give the images as {reference}, and the file to write as {reference_out}",
    ),
    ("metric", "{metrics}"),
    ("fid calc_fid compute_fid eval_fid", "did you mean {metrics} fid?", "evaluate.py computes FID"),
    ("sfid", "did you mean {metrics} sfid?"),
    ("isc inception_score", "did you mean {metrics} is?"),
    ("kid calc_kid compute_kid", "did you mean {metrics} kid?"),
    ("prc pr prdc precision_recall recall", "did you mean {metrics} precision,recall?"),
    ("num num_gen max_samples", "{num_samples}"),
    ("ppl lpips", "that metric is not computed here: {metrics} lists the ones that are"),
    (
        "feature_extractor feature_network feature_model inception_model fd_dinov2 dinov2 vgg",
        "did you mean {features}? Besides Inception it takes dinov2-vit-l-14, or a TorchScript file such as VGG-16",
    ),
    (
        "dims feature_layer feature_extractor_internal_dtype",
        "published numbers use the 2048 features of the last pooling: leave it out; {features} names other networks",
    ),
    (
        "feature_extractor_weights_path feature_weights_path inception_path inception_weights detector detector_url",
        "{feature_weights}",
    ),
    (
        "mode resize_mode samples_resize_and_crop",
        "images are resized for the network as TensorFlow does, which clean-fid calls legacy_tensorflow: leave it "
        "out; {resize} changes the images of both sets first",
    ),
    ("isc_splits num_splits n_splits n_split", "{splits}"),
    ("num_subsets n_subsets", "{kid_subsets}"),
    ("subset_size max_subset_size", "{kid_subset_size}"),
    (
        "k nearest_k nhood_size prc_neighborhood",
        "precision and recall of {metrics} take the 3 nearest neighbours, as published: leave it out",
    ),
    ("result_file results_file results_path output_json json_out", "{results_dir}"),
)
_ADVICE = {word: advice for words, *advice in _TABLE for word in words.split()}


def advice(word: str, known: Collection[str], show: Callable[[str], str]) -> str:
    """The end of a message about an unknown setting, "; did you mean --lr?", or an empty string.

    known are the settings that would be right there, and `show` writes a setting as the user would.
    """
    name = word.strip("-").lower().replace("-", "_")
    if name in known:
        return f"; did you mean {show(name)}?"
    for sentence in _ADVICE.get(name, ()):
        names = _NAMES.findall(sentence)
        if all(each in known for each in names):
            text = _NAMES.sub(lambda found: show(found[1]), sentence)
            return f"; did you mean {text}?" if sentence == f"{{{names[0] if names else ''}}}" else f"; {text}"
    if name.startswith("no_") and name[3:] in known:
        return f"; did you mean {show(name[3:])} False?"
    return "" if name in _ADVICE else did_you_mean(name, known, show)
