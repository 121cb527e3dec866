"""The process of the command line: ``vbon``, and ``python -m vbon_jax``."""

from typing import NoReturn

from vbon_jax import exits


def entry() -> NoReturn:
    """Runs ``cli.main`` on the command line of this process, and ends it."""
    exits.prepare()
    try:
        from vbon_jax import cli  # slow to import: only now, when signals are handled

        code = cli.main()
    except SystemExit:
        raise
    except BaseException as error:
        code = exits.report(error)
    exits.leave(code)


if __name__ == "__main__":
    entry()
