"""The times to plan with: a profile by name, this machine's own, or parameter counts.

A plan says which of them it rests on, and how old they are.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ppsd.config import EngineConfig
from ppsd.engine.peer import Subject
from ppsd.errors import ConfigError, PpsdError, shortened
from ppsd.model import kernels
from ppsd.plan.profile import Profile, estimate, load_profile, profile_root
from ppsd.plan.sizes import Sizes
from ppsd.provenance import machine, provenance

QUICK_S = 10.0  # for parts of a model; less exact than `ppsd profile`, and soon over
RETAKEN = (
    "the profile of %s was taken with other kernels: it is taken anew, once, in half a minute or so"
)

LOG = logging.getLogger(__name__)


def profile_for(config: EngineConfig, subject: Subject, *, retake: bool) -> Profile:
    """Return the profile to plan with; its ``source`` says how old it is, or why there is none.

    A profile given by name is used whatever machine it was taken on. This machine's own is taken
    anew, with ``retake``, when what computes has changed since.
    """
    counts = estimate(
        Sizes.of(subject.spec),
        subject.dtype.itemsize,
        model=subject.spec.name,
        fingerprint=subject.fingerprint,
        dtype=subject.dtype_name,
    )
    if config.plan == "off":
        return counts
    if config.plan != "auto":
        profile = load_profile(Path(config.plan))
        _check(profile, config.plan, subject)
        _check_kernels(profile, config.plan)
        stale = _other_machine(profile) or _other_kernels(profile)
        notes = [note for note in (profile.age, stale) if note]
        return replace(profile, source=", ".join([profile.source, *notes]))
    if any(device != "cpu" for device in config.devices):
        return counts
    try:
        if not any(profile_root().glob(f"{subject.fingerprint[:16]}-*")):
            return counts  # and no kernels are compiled to know the name of one
        subject.place.lstat()
    except OSError:  # there is none, or no home for one
        return counts
    try:
        profile = _own(subject, retake)
    except (PpsdError, OSError) as error:
        return replace(counts, source=f"{counts.source}; {shortened(str(error))}")
    return replace(profile, source=f"{profile.source}, {profile.age}")


def _own(subject: Subject, retake: bool) -> Profile:
    """Return the profile in the cache, or a new one; raises PpsdError when neither is to be had."""
    profile = load_profile(subject.place, own=True)
    _check(profile, str(subject.place), subject)
    remedy = "`ppsd profile` takes it anew"
    if other := _other_machine(profile):
        raise PpsdError(f"the profile here was taken {other}, {remedy}")
    if not (other := _other_kernels(profile)):
        return profile
    if not retake:
        raise PpsdError(f"the profile here was taken {other}, {remedy}")
    LOG.warning(RETAKEN, subject.spec.name)
    from ppsd.engine.profiler import profiler

    with profiler(subject, QUICK_S) as take:
        profile = take(provenance(), lambda done, total: None)
    profile.save(subject.place)
    return profile


def _other_machine(profile: Profile) -> str:
    """Say how this machine differs from a profile's; nothing if it does not."""
    then, now = profile.provenance, machine()
    for name, what in (("cpu", "processors"), ("cores", "cores")):
        if then.get(name) != now[name]:
            return f"with other {what}"
    return ""


def _other_kernels(profile: Profile) -> str:
    """Say so if other code computes now than when a profile was taken."""
    same = profile.provenance.get("kernels") == machine()["kernels"]
    return "" if same and profile.kernels == kernels.kind(profile.dtype) else "with other kernels"


def _check(profile: Profile, where: str, subject: Subject) -> None:
    """Raise ConfigError unless a profile is of this model, dtype and number of threads."""
    pairs = {
        "model": (profile.fingerprint[:12], subject.fingerprint[:12]),
        "dtype": (profile.dtype, subject.dtype_name),
        "threads": (profile.threads, subject.threads),
        "codes": (profile.codes, subject.codes),
    }
    _compare(profile, where, pairs)


def _check_kernels(profile: Profile, where: str) -> None:
    """Raise ConfigError unless a measured profile is of the kind of kernels in use."""
    if profile.measured:
        _compare(profile, where, {"kernels": (profile.kernels, kernels.kind(profile.dtype))})


def _compare(profile: Profile, where: str, pairs: dict[str, tuple[object, object]]) -> None:
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            allowed = f"one of {name} {wanted or 'none'}, not of {found or 'none'}"
            raise ConfigError("profile", where, f"{allowed} ({profile.model})")
