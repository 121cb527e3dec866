"""One rollout, gradient and update on a mesh, of one process or of several, held to one device's.

python -m tests.equality

prints the table of the meshes of 8 devices, and of 2 and 4 processes with a device each.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax starts
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from tests.faults import run
from tests.training import tiny
from vbon_jax import processes, sharding
from vbon_jax.methods import vbon
from vbon_jax.models import decoder
from vbon_jax.training.ppo import Experience

CONFIG = decoder.DecoderConfig(
    vocab_size=48, positions=32, layers=2, width=32, heads=8, mlp_width=64, initializer_range=0.4
)
MESHES = {
    "8 data": (8, 1, 1), "8 fsdp": (1, 8, 1), "8 tensor": (1, 1, 8), "2x2x2": (2, 2, 2),
}  # fmt: skip
PROCESSES = {"2 processes": (2, 1, 1), "4 processes": (1, 2, 2)}


@dataclasses.dataclass(frozen=True)
class Found:
    """What is compared, on the host.

    Attributes:
      tokens: of the rollout [B, T], 0 where there is none.
      log_probs: of its tokens, nats.
      loss: of one gradient step on the whole rollout.
      gradients: its gradients by path.
      params: after it, by path.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]

    def furthest(self, other: "Found") -> dict[str, float]:
        """The greatest difference of each; of tokens how many differ."""

        def of(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
            return max(float(np.abs(mine[k] - theirs[k]).max()) for k in mine)

        return {
            "tokens": float(np.sum(self.tokens != other.tokens)),
            "log-probs": float(np.abs(self.log_probs - other.log_probs).max()),
            "loss": abs(self.loss - other.loss),
            "gradients": of(self.gradients, other.gradients),
            "params": of(self.params, other.params),
        }


def found(mesh: jax.sharding.Mesh) -> Found:
    """The figures of a mesh, the same on every process that has a part of it."""
    params = jax.jit(decoder.init, static_argnums=0)(CONFIG, jax.random.key(0))
    world = tiny.World(CONFIG, jax.device_get(params))
    whole = {"ppo_epochs": 1, "minibatch_size": tiny.BATCH}
    with jax.set_mesh(mesh):
        state = world.fresh(mesh)
        batch = world.rollout_batch(mesh, state)
        exp: Experience = world.experience(mesh, batch, **whole)[0]
        setup = tiny.changed(world.setup, **whole)
        grads, metrics = tiny.gradients(state.params, world.reference(mesh), exp, setup=setup)
        # Two programs at once may each wait for a thread that the other holds in a collective: on
        # CPU all share a few, and a process that need not compile the second one is ahead.
        jax.block_until_ready(grads)
        new, _ = vbon.update(*world.arguments(mesh, state, batch), setup=setup)
        rollout, loss, grads, after = sharding.fetch(
            (batch.rollout, metrics["loss"], grads, new.params)
        )
    mask = rollout.mask_BxT
    return Found(
        rollout.tokens_BxT * mask, rollout.log_probs_BxT * mask, float(loss), _flat(grads),
        _flat(after),
    )  # fmt: skip


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def of_processes(sizes: tuple[int, int, int]) -> Found:
    """`found`, by processes of this host with a device each."""
    count = int(np.prod(sizes))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.npz"
        flags = next(a for a in run.together(count, Path(folder))[0] if "coordinator" in a)
        address = flags.partition("=")[2]
        argvs = [
            [sys.executable, "-m", "tests.equality", "--out", str(out), "--coordinator", address,
             "--process", str(i), "--sizes", *map(str, sizes)]
            for i in range(count)
        ]  # fmt: skip
        ended = run.all_done(argvs)
        assert [each.code for each in ended] == [0] * count, ended
        return _read(out)


def _write(path: Path, figures: Found) -> None:
    parts = {"tokens": figures.tokens, "log_probs": figures.log_probs, "loss": figures.loss}
    for name in ("gradients", "params"):
        parts |= {f"{name}:{k}": v for k, v in getattr(figures, name).items()}
    np.savez(path, **parts)


def _read(path: Path) -> Found:
    with np.load(path) as file:
        parts = dict(file)
    trees: dict[str, dict[str, np.ndarray]] = {"gradients": {}, "params": {}}
    for key in parts:
        name, _, leaf = key.partition(":")
        if leaf:
            trees[name][leaf] = parts[key]
    return Found(parts["tokens"], parts["log_probs"], float(parts["loss"]), **trees)


def main(argv: list[str] | None = None) -> None:
    """Prints the table; or is one of the processes, the first of which writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    parser.add_argument("--sizes", type=int, nargs=3)
    args = parser.parse_args(argv)
    if args.coordinator:
        processes.connect(args.coordinator, int(np.prod(args.sizes)), args.process)
        figures = found(sharding.make_mesh(*args.sizes))
        if processes.first():
            _write(args.out, figures)
        return
    one = found(sharding.make_mesh())
    rows: list[tuple[object, ...]] = [("on", *one.furthest(one))]
    for name, sizes in MESHES.items():
        rows.append((name, *_words(found(sharding.make_mesh(*sizes)).furthest(one))))
    for name, sizes in PROCESSES.items():
        rows.append((name, *_words(of_processes(sizes).furthest(one))))
    print(run.table(rows))


def _words(differences: dict[str, float]) -> list[str]:
    return [f"{v:.1e}" if v else "0" for v in differences.values()]


if __name__ == "__main__":
    if "--coordinator" not in sys.argv:
        subprocess.run(
            [sys.executable, "-c", "from tests import equality; equality.main()"],
            env=run.environment(devices=8), check=True,
        )  # fmt: skip
    else:
        main()
