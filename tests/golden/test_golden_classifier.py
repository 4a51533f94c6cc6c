"""Classifiers reproduce recorded logits and gradients."""

import torch
import torch.nn.functional as F
from helpers.golden_cases import Case, cases, classifier_settings, load_classifier, log_prob_gradient

from fastdiff.models.classifier import build_classifier


@cases("classifier_forward")
def test_logits_and_gradients(case: Case) -> None:
    model = load_classifier(case.config["model"], case.weights())
    x, t, y = case.tensor("in_x"), case.tensor("in_t_frac"), case.tensor("in_y")
    stride = case.config.get("store_stride", 1)
    with torch.no_grad():
        case.check("out_int", model(x, case.tensor("in_t_int")))
    log_prob, gradient = log_prob_gradient(model, x, t, y)
    case.check("out_log_prob", log_prob)
    case.check("out_grad_x", gradient[..., ::stride, ::stride])
    logits = model(x, t)
    case.check("out_frac", logits)
    loss = F.cross_entropy(logits, y)
    case.check("out_loss", loss)
    loss.backward()
    case.check_gradients(model)


@cases("reference_configs", family="guided")
def test_released_classifiers(case: Case) -> None:
    """Keys, shapes and parameter counts. The work is less than recorded, as the pool computes one query alone."""
    classifiers = {
        name: spec for name, spec in case.config["configs"].items() if spec["builder"] == "create_classifier"
    }
    assert classifiers
    for name, spec in classifiers.items():
        with torch.device("meta"):
            model = build_classifier(classifier_settings(spec))
        state = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert list(state.items()) == list(case.shapes[name].items()), name
        expected = case.expected["configs"][name]
        assert sum(p.numel() for p in model.parameters()) == expected["param_count"]
        assert len(list(model.parameters())) == expected["num_tensors"]
        assert [1, model.settings.num_classes] == expected["output_shape"]
