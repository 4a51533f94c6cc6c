"""The command line of a script: a flag for each setting, with its type, default and help, which `--help` shows."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal, NoReturn, get_args, get_origin

from fastdiff.config.aliases import advice
from fastdiff.config.checkpoint import Layer
from fastdiff.config.family import FAMILIES
from fastdiff.errors import UserError
from fastdiff.settings import Settings, given_by_word

_SHORT = {"out_dir": "--out", "grid_images": "--grid"}  # second names of flags


class _Once(argparse.Action):
    """A flag that names a file, of which a second one would silently replace the first."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        if before := getattr(namespace, self.dest):
            raise UserError(f"{option} is given twice, {before} and {value}; put the settings of both into one file")
        setattr(namespace, self.dest, value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def read_flags(
    argv: list[str] | None, description: str, sections: dict[str, type[Settings]]
) -> tuple[argparse.Namespace, Layer]:
    """Read the command line (sys.argv if argv is None): all flags, and the settings given by flags, by section.

    sections  section → the class of its settings. The values are texts, which the class validates later.
    Raises UserError for unknown flags; --help prints the help and exits.
    """
    parser = _parser(description, sections)
    args, unknown = parser.parse_known_args(argv)
    for section, settings in sections.items():
        if (name := given_by_word(settings)) and unknown and not unknown[0].startswith("-"):
            if hasattr(args, f"{section}.{name}"):
                raise UserError(f"{unknown[0]} belongs to no flag, because --{name} is given as well; leave one out")
            setattr(args, f"{section}.{name}", unknown.pop(0))
    if unknown:
        name = unknown[0].split("=")[0]
        options = [option for action in parser._actions for option in action.option_strings]
        known = [option.removeprefix("--") for option in options if option.startswith("--")]
        near = advice(name, known, lambda known: f"--{known}")
        if not name.startswith("-"):
            words = sys.argv[1:] if argv is None else argv
            one_of_several = _one_of_several(unknown[0], words, parser)
            if one_of_several or not near:
                raise UserError(one_of_several or _stray(unknown[0], words, parser))
        raise UserError(f"{name} is not a flag of this script{near or '; --help lists them'}")
    layer: Layer = {section: {} for section in sections}
    for key, value in vars(args).items():
        section, _, name = key.partition(".")
        if name:
            layer[section][name] = value
    return args, layer


def _one_of_several(word: str, words: list[str], parser: _Parser) -> str:
    """The message about the second value of a flag that takes several, separated by commas; empty for another word."""
    index = words.index(word)
    action = parser._option_string_actions.get(words[index - 2]) if index > 1 else None
    if action and action.metavar == "A,B,..":
        flag, value = words[index - 2 : index]
        return f"{word} belongs to no flag; several values are separated by commas: {flag} {value},{word}"
    return ""


def _stray(word: str, words: list[str], parser: _Parser) -> str:
    """The message about a word that is neither a flag nor the value of one."""
    index = words.index(word)
    before = words[max(index - 1, 0)]
    if any(before in action.option_strings and action.nargs == 0 for action in parser._actions):
        return f"{before} takes no value; leave {word} out"
    if index == 0 and {"--samples", "--reference"} <= parser._option_string_actions.keys():
        return (
            f"{word} belongs to no flag; the images to judge are given as --samples, and what they are compared with "
            "as --reference"
        )
    return f"{word} belongs to no flag; each takes one value, in quotes if it contains spaces"


def _parser(description: str, sections: dict[str, type[Settings]]) -> _Parser:
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    config = "JSON file with settings, section by section, or the name of one in configs/, such as cifar10_uncond"
    parser.add_argument("--config", metavar="FILE", default=None, action=_Once, help=config)
    parser.add_argument("--print_config", action="store_true", default=False, help="print the settings and exit")
    # DeepSpeed's launcher and torch.distributed.launch add one of these.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    if "model" in sections:
        family = "whose defaults hold for settings that nothing else gives: improved-diffusion's or guided-diffusion's"
        shown = "(default: improved, but guided for a file whose weights have its features)"
        parser.add_argument("--family", metavar="|".join(FAMILIES), default="", help=f"{family} {shown}")
    if "train" in sections:
        parser.add_argument("--deepspeed", metavar="FILE", default=None, help="DeepSpeed JSON, merged over ours")
        dry_run = "build everything, run one step on real data, report, and write nothing"
        parser.add_argument("--dry_run", action="store_true", default=False, help=dry_run)
    for section, settings in sections.items():
        group = parser.add_argument_group(f"{section}: {(settings.__doc__ or '').strip().splitlines()[0].rstrip('.')}")
        defaults = settings().model_dump(mode="json")
        for name, field in settings.model_fields.items():
            text = " ".join((field.description or "").split()).replace("%", "%%")
            is_switch = field.annotation is bool or any(value is True for value in get_args(field.annotation))
            bare: dict[str, Any] = {"nargs": "?", "const": "True"} if is_switch else {}
            group.add_argument(
                f"--{name}",
                *([_SHORT[name]] if name in _SHORT else []),
                dest=f"{section}.{name}",
                metavar=_metavar(field.annotation),
                help=f"{text} (default: {'empty' if defaults[name] == '' else defaults[name]})",
                **bare,
            )
    return parser


def _metavar(annotation: Any) -> str:
    if annotation in (int, float, bool, str):
        return {int: "N", float: "X", bool: "True|False", str: "TEXT"}[annotation]
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return "A,B,.." if Ellipsis in get_args(annotation) else "N|HxW"
    return "|".join(map(_metavar, get_args(annotation)))
