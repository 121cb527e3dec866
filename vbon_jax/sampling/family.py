"""A trained family of policies: one of them for any n, as a sampler of its own."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vbon_jax import processes, sharding
from vbon_jax.errors import InputError, writing
from vbon_jax.models import family, trainable
from vbon_jax.sampling.sampler import Sampler

FILE, NOTE = "family.safetensors", "family.json"


@dataclasses.dataclass(frozen=True)
class Family:
    """The policies of every n from 1 to the largest that was trained for; see ``models.family``.

    Attributes:
      reference: the model that they are at n = 1, without adapters.
      own: adapters and gates, from ``models.family.gated``.
      n: the two that n was drawn between in training.
      lora_alpha: of the adapters.
    """

    reference: Sampler
    own: Any
    n: tuple[float, float]
    lora_alpha: float

    def at(self, n: float) -> Sampler:
        """The policy for one n, its adapters merged into weights of its own.

        Raises:
          InputError: n is below 1, or above what was trained for.
        """
        top = self.n[1]
        if not 1 <= n <= top:
            raise InputError(f"n={n:g}: the family was trained for n from 1 to {top:g}")
        model = self.reference.model
        config = dataclasses.replace(model.config, lora_alpha=self.lora_alpha)
        params = trainable.join(model.params, family.fixed(self.own, n, top))
        model = dataclasses.replace(model, config=config, params=params)
        return dataclasses.replace(self.reference, model=model).merged()

    def save(self, path: str | Path) -> None:
        """Writes adapters, gates and what belongs to them; the reference is not copied."""
        folder, flat = Path(path), flatten_dict(self.own, sep="/")
        host = {name: np.asarray(x) for name, x in sharding.fetch(flat).items()}
        if not processes.first():
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(host, str(folder / FILE))
            note = {"n": list(self.n), "lora_alpha": self.lora_alpha, "features": family.FEATURES}
            (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def load(path: str | Path, reference: Sampler) -> Family:
    """Reads what ``Family.save`` wrote.

    Args:
      path: the folder.
      reference: the model that it was trained from.

    Raises:
      InputError: a file is missing, cut or of another model.
    """
    folder = Path(path)
    try:
        note = json.loads((folder / NOTE).read_text())
        flat = load_file(str(folder / FILE))
        low, top = map(float, note["n"])
        alpha, count = float(note["lora_alpha"]), int(note["features"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no family of policies: {error!r}") from error
    weights = flatten_dict(reference.model.params, sep="/")
    for name, x in flat.items():
        place = name.rpartition("/")[0]
        kernel, width = weights.get(f"{place}/kernel"), weights["ln_f/scale"].shape[0]
        of_norm = place == "ln_f" and x.shape[-1] == width
        if not of_norm and (kernel is None or len(kernel) != len(x)):
            raise InputError(f"{folder}: {name} {x.shape} has no place in this reference model")
    if count != family.FEATURES:
        raise InputError(f"{folder}: gates of {count} features, not {family.FEATURES}")
    own = unflatten_dict({k: jnp.asarray(x) for k, x in flat.items()}, sep="/")
    placed = sharding.place(own, reference.mesh, "decoder")
    return Family(reference, placed, (low, top), alpha)


def steps(n: Sequence[float]) -> tuple[float, ...]:
    """Where a family is looked at: 2, 4, 8, ... up to its largest n, and that itself."""
    top = n[1]
    found = [2.0**k for k in range(1, int(np.log2(top)) + 1)]
    return tuple(dict.fromkeys([*found, float(top)]))
