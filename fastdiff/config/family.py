"""Families of networks: whose defaults hold for the settings that nothing else gives.

fastdiff's own defaults are improved-diffusion's. guided-diffusion's scripts have the same settings, some of them with
another default, so that a command written for it needs its defaults as well.
"""

from __future__ import annotations

from typing import Any

from fastdiff.errors import UserError, did_you_mean, quoted

# Family → section → the defaults that differ from improved-diffusion's (guided-diffusion's script_util.py; its data
# loader mirrors images unless it is told otherwise, which none of its scripts does, not even the one that scores).
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "improved": {},
    "guided": {
        "model": {"scale_stem": True},
        "diffusion": {"rescale_timesteps": False, "rescale_learned_sigmas": False},
        "data": {"random_flip": True},
    },
}
NAMES = {"improved": "improved-diffusion", "guided": "guided-diffusion"}


def known_family(name: Any, where: str) -> str:
    """Return the name. Raises UserError, which begins with `where`, if there is no such family."""
    if not isinstance(name, str) or name not in FAMILIES:
        near = did_you_mean(name, FAMILIES) if isinstance(name, str) else ""
        raise UserError(f"{where} must be {' or '.join(FAMILIES)}, not {quoted(name)}{near}")
    return name
