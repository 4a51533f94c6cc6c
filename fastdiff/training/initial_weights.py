"""Starts a new run from the weights of another network: `--init_from`.

Every tensor is taken as it is, but for two, which may have other rows in the new network: the label embedding, if the
classes are others, and the last layer, if only one of the two networks predicts variances, or a classifier's classes
are others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.config.checkpoint import Checkpoint, open_checkpoint
from fastdiff.config.presets import preset_for_file
from fastdiff.config.sections import Config
from fastdiff.errors import blaming
from fastdiff.images.listing import same_to_readers
from fastdiff.models import BackboneSettings, UNet, weights
from fastdiff.models.classifier import Classifier, build_network
from fastdiff.models.classifier_settings import ClassifierSettings, NetworkSettings, Pool
from fastdiff.models.classifier_weights import LAST_LAYER
from fastdiff.training.checkpoints.changes import of_equal_shapes, process_changes, shown
from fastdiff.training.checkpoints.format import LABELS

_LAST_LAYER = ("out.2.weight", "out.2.bias")
_EMBEDDING_BIAS = "time_embed.2.bias"
_NAMED = 10  # classes that a log line names


def open_initial(config: Config) -> Checkpoint:
    """Read the checkpoint that init_from names. UserError if a network of these settings can't start from it."""
    with blaming("--init_from"):
        checkpoint = open_checkpoint(config.train.init_from)
        with torch.device("meta"):
            fresh = build_network(config.model).state_dict()
        state, _ = _adapted(checkpoint, fresh, config.model, [])
        weights.check_fits(config.model, state, checkpoint.file)
    return checkpoint


def take_weights(
    checkpoint: Checkpoint, model: UNet | Classifier, config: Config, class_names: Sequence[str]
) -> list[str]:
    """Load the checkpoint's weights into a new network; returns lines for the log about what was taken.

    class_names are those of the run's images. Raises UserError for weights that don't fit or aren't finite.
    """
    state, lines = _adapted(checkpoint, model.state_dict(), config.model, class_names)
    with blaming("--init_from"):
        weights.load_into(model, state, checkpoint.file)
    whole = sum(checkpoint.state.get(name) is value for name, value in state.items())
    return [
        f"starting from {checkpoint.file}: {whole} of {len(state)} tensors are taken as they are",
        *lines,
        *_settings_lines(checkpoint, config),
    ]


def _settings_lines(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Sentences on the settings with which the weights were trained and that are others in this run."""
    preset = preset_for_file(checkpoint.file)
    trained = checkpoint.info or (preset.layer if preset else {})
    if not trained:
        return []
    changes = of_equal_shapes(process_changes(trained, config), class_cond=False)  # other lines tell of the classes
    others = ", ".join(f"{name} {shown(now)} (it was {shown(then)})" for _, name, then, now in changes)
    return [f"network and diffusion process are the checkpoint's{', but for ' if others else ''}{others}"]


def _adapted(
    checkpoint: Checkpoint, fresh: dict[str, Tensor], settings: NetworkSettings, class_names: Sequence[str]
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """The checkpoint's weights with label embedding and last layer as these settings have them, and lines for the log.

    fresh  the state_dict of a new network, for rows that begin anew
    """
    state, lines = OrderedDict(checkpoint.state), []
    if isinstance(settings, ClassifierSettings):
        return state, _renew_head(state, fresh, settings.classifier_pool)
    if line := _match_last_layer(state, fresh, settings.in_channels):
        lines.append(line)
    table, bias = state.get(LABELS), state.get(_EMBEDDING_BIAS)
    if table is None and settings.class_cond:
        state[LABELS] = torch.zeros_like(fresh[LABELS])
        lines.append(f"{LABELS} begins anew, at zero: at first the network ignores classes, as the checkpoint's does")
    elif table is None or bias is None or not (table.dim() == 2 and len(table)) or _differ(table[0], bias, fresh):
        pass  # there is nothing to match, or the weights are of another network, which comparing all shapes shows
    elif settings.class_cond:
        state[LABELS], line = _match_table(checkpoint, table, fresh[LABELS], settings, class_names)
        lines.append(line)
    else:
        has_null = _has_null_class(checkpoint)
        known = table[: len(checkpoint.class_names) or None]  # rows without a class were never trained
        typical = table[-1] if has_null else known.float().mean(0)
        state[_EMBEDDING_BIAS] = bias.float() + typical.float()
        del state[LABELS]
        which = "the row of the null class" if has_null else "the mean of its classes' rows"
        lines.append(f"{LABELS} is left out, and {which} added to {_EMBEDDING_BIAS} in its place")
    return state, lines


def _renew_head(state: OrderedDict[str, Tensor], fresh: dict[str, Tensor], pool: Pool) -> list[str]:
    """Let a classifier's last layer begin anew if the classes are others; returns lines for the log."""
    last = [LAST_LAYER[pool], LAST_LAYER[pool].replace("weight", "bias")]
    pairs = [(state[name].shape, fresh[name].shape) for name in last if name in state]
    if len(pairs) < len(last) or any(then[1:] != now[1:] or then == now for then, now in pairs):
        return []  # nothing is to be done, or the weights are of another network, which comparing all shapes shows
    state.update({name: fresh[name] for name in last})
    return [f"{' and '.join(last)} begin anew, for {len(fresh[last[0]])} classes"]


def _differ(row: Tensor, bias: Tensor, fresh: dict[str, Tensor]) -> bool:
    """Whether the label embedding is of another width than the time embedding, or than the new network's."""
    return not row.shape == bias.shape == fresh[_EMBEDDING_BIAS].shape


def _match_last_layer(state: dict[str, Tensor], fresh: dict[str, Tensor], channels: int) -> str:
    """Give the last layer, whose first rows predict the mean, as many rows as in the new network.

    Returns a line for the log; empty where nothing is to be done, or the shapes are of another network.
    """
    pairs = {name: (state[name], fresh[name]) for name in _LAST_LAYER if name in state}
    sizes = {(*a.shape[:1], *b.shape[:1]) for a, b in pairs.values()}
    if sizes - {(channels, 2 * channels), (2 * channels, channels)} or not sizes:
        return ""
    if any(a.shape[1:] != b.shape[1:] for a, b in pairs.values()):
        return ""
    for name, (taken, new) in pairs.items():
        state[name] = torch.cat([taken[:channels].float().to(new.device), new[channels:]])
    rest = "begins anew" if fresh[_LAST_LAYER[0]].shape[0] > channels else "is left out"
    return f"{' and '.join(_LAST_LAYER)}: the half that predicts the mean is taken, that for the variances {rest}"


def _has_null_class(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.info and checkpoint.info["model"].get("null_class"))


def _match_table(
    checkpoint: Checkpoint,
    taken: Tensor,
    fresh: Tensor,
    settings: BackboneSettings,
    class_names: Sequence[str],
) -> tuple[Tensor, str]:
    """The label embedding [num_labels, C] float32 of the new network, and a line for the log.

    Rows go by the names of the classes where the checkpoint has them, else by number where there are as many.
    """
    had_null = _has_null_class(checkpoint)
    if not checkpoint.info and settings.null_class:  # shapes don't show it: as many rows are the same ones
        had_null = len(taken) == settings.num_labels
    rows, null_row = (taken[:-1], taken[-1:]) if had_null else (taken, torch.zeros_like(taken[:1]))
    new = fresh[: settings.num_classes].clone()
    if checkpoint.class_names and class_names:
        line = _take_by_name(new, rows, checkpoint.class_names, class_names)
    elif len(rows) == len(new):
        new.copy_(rows)
        line = f"the {len(rows)} rows are taken by number, because the checkpoint doesn't name its classes"
    else:
        line = f"begins anew for {len(new)} classes; the checkpoint has {len(rows)}, without names"
    if settings.null_class:
        new = torch.cat([new, null_row.float().to(new.device)])
        line += "; the row of the null class is taken" if had_null else "; the row of the null class begins at zero"
    return new, f"{LABELS}: {line}"


def _take_by_name(new: Tensor, rows: Tensor, before: Sequence[str], now: Sequence[str]) -> str:
    """Copy into `new` the rows of the classes that both have, by their names; returns which."""
    row_of = {same_to_readers(name): row for name, row in zip(before, rows, strict=False)}
    shared = [name for name in now if same_to_readers(name) in row_of]
    for number, name in enumerate(now[: len(new)]):
        if (row := row_of.get(same_to_readers(name))) is not None:
            new[number] = row.to(new)
    added = [name for name in now if name not in shared]
    parts = [f"the rows of {_list(shared)} are taken by name" if shared else "no class has the name of one before"]
    parts += [f"those of {_list(added)} begin anew"] if added else []
    return ", ".join(parts)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} class{'es' * (len(names) > 1)} ({', '.join(names[:_NAMED])}{more})"
