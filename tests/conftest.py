"""Eight fake CPU devices for the sharding tests, and one compilation cache for the whole run."""

import os
import tempfile
from pathlib import Path

# Before jax starts: devices cannot be added afterwards. Most of the tests' time is LLVM's, on
# programs that then run for milliseconds, so its costly passes are off; XLA's own and the
# partitioning stay as they are. Flags of one's own come later and win, as in
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false".
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    + os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "vbon_jax_test_xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import numpy as np
import pytest

from vbon_jax import sharding
from vbon_jax.models import decoder
from vbon_jax.models.hf import hub


@pytest.fixture(scope="session")
def config() -> decoder.DecoderConfig:
    """A decoder small enough to compile at once, with an odd vocabulary."""
    return decoder.DecoderConfig(
        vocab_size=37, positions=32, layers=2, width=16, heads=2, mlp_width=32,
        initializer_range=0.4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def params(config: decoder.DecoderConfig):
    """Random parameters: wide enough an initialisation that distributions are far from uniform."""
    return jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))


@pytest.fixture(scope="session")
def mesh():
    return sharding.make_mesh()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def few_programs_in_memory():
    """Lets go of compiled programs between files once they take much: hundreds of them add up."""
    yield
    if (
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        > 3 * 2**30
    ):
        jax.clear_caches()


@pytest.fixture(autouse=True)
def hub_asked_anew():
    """What a name on the hub was in one test is nothing in the next."""
    yield
    hub._download.cache_clear()


# Files whose tests take more than a few seconds each. All others are marked `fast`.
SLOW = (
    "bench/test_load.py", "bench/test_plan.py", "bench/test_population.py",
    "bench/test_sampling.py",
    "bon/test_amortised.py",
    "bon/test_distribution.py", "bon/test_estimators.py", "bon/test_exponential.py",
    "bon/test_log_f.py", "bon/test_references.py", "data/sources/test_hub.py",
    "data/test_sample_writer.py", "evaluation/test_heldout.py", "evaluation/test_measure.py",
    "faults/test_bad_inputs.py", "faults/test_flips.py", "faults/test_processes.py",
    "faults/test_remedies.py", "launch/test_local.py", "launch/test_tpu_pod.py",
    "methods/test_jbond.py", "methods/test_learning.py", "methods/test_vbon.py",
    "models/hf/test_families.py", "models/hf/test_hf.py", "models/hf/test_peft.py",
    "models/test_family.py",
    "models/test_decoder.py", "models/test_encoder.py", "models/test_trainable.py",
    "report/test_figures.py", "report/test_report.py", "rewards/test_classifier.py",
    "rl/test_chunked.py", "stages/test_adoption.py", "stages/test_choose.py",
    "stages/test_experiments.py", "stages/test_export.py", "stages/test_family.py",
    "stages/test_need.py",
    "stages/test_plan.py", "stages/test_stages.py", "stages/test_sweep.py",
    "test_api.py", "test_compiled.py", "test_docs.py", "test_equality.py", "test_processes.py",
    "test_tokenizer_kinds.py",
    "training/test_amortised.py", "training/test_family.py", "training/test_offline.py",
    "training/test_partly_trained.py", "training/test_population.py", "training/test_ppo.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Marks the tests of every file that is not listed as slow."""
    here = Path(__file__).parent
    missing = [name for name in SLOW if not (here / name).exists()]
    assert not missing, f"tests/conftest.py lists files that are gone: {missing}"
    for item in items:
        if item.path.relative_to(here).as_posix() not in SLOW:
            item.add_marker(pytest.mark.fast)
