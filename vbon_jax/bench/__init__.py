"""Benchmarks of time and memory, each with what it is compared against.

``vbon bench`` prints the first two, a minute or two on two CPU cores:

* ``log_f``: seconds of the tables of log F, of look-ups in them and of Kolmogorov-Smirnov tests of
  all prompts, against loops over prompts in NumPy and SciPy. The results must agree.
* ``population``: seconds of training 8 policies as one population, against 8 single runs.

The others are commands of their own:

* ``python -m vbon_jax.bench.ppo``: seconds and floating-point rate of a vBoN iteration by phase
  (rollout, score, gradient steps), against the machine's rate of matrix products. ``--help`` lists
  its options.
* ``python -m vbon_jax.bench.load``: host memory and seconds of loading a checkpoint of 1.8 GB,
  against the size of its arrays. Linux only.
* ``python -m vbon_jax.bench.plan``: the memory that ``vbon plan`` predicts for stage ``train``,
  against the measured peak. Linux only; run from the root of the repository. ``--help`` lists its
  options.
"""
