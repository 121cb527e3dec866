"""What ``vbon bench`` measures, each figure with what it is compared against.

* ``sampling``: a policy against best-of-n and corrected sampling, many responses to a prompt, rows
  that end early; and ``engines``, transformers and vLLM on the same weights.
* ``ppo``: seconds and floating-point rate of a vBoN iteration by phase.
* ``log_f``: tables of log F, look-ups in them and Kolmogorov-Smirnov tests of all prompts, against
  loops over prompts in NumPy and SciPy. The results must agree.
* ``population``: 8 policies trained as one population, against 8 single runs.
* ``load``: host memory and seconds of loading a checkpoint of 1.8 GB. Linux only.
* ``plan``: the memory that ``vbon plan`` predicts, against the measured peak. Linux only.

``machine`` has the ceilings, matrix products and memory, that shares are taken of; ``command`` the
table, ``bench.json`` and the figure.
"""
