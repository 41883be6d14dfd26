"""The program of a probe's process: import one module, say how that went as JSON. Imports nothing of ours."""

import json
import sys


def main() -> None:
    """Read the order from standard input, obey it, and end without running anybody's exit handlers."""
    order = json.loads(sys.stdin.read())
    sys.path[:] = order["path"]  # before anything else is imported: this file's folder stands in front of it

    import faulthandler
    import importlib
    import os
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = os.dup(1)
    os.dup2(2, 1)  # what the module prints is no answer
    faulthandler.enable()
    for name in order["before"]:
        importlib.import_module(name)
    faulthandler.dump_traceback_later(order["timeout_s"], exit=True)
    os.write(answer, json.dumps(_outcome(order["module"], order["names"])).encode())
    os._exit(0)


def _outcome(name: str, names: list[str]) -> dict[str, object]:
    import importlib

    try:
        module = importlib.import_module(name)
        absent = [wanted for wanted in names if not _offers(module, wanted)]
    except BaseException as exc:  # noqa: BLE001 - this process exists to see what is raised
        return {"error": type(exc).__name__, "messages": _messages(exc), "absent_module": getattr(exc, "name", None)}
    version = getattr(sys.modules[name.split(".")[0]], "__version__", "")
    return {"version": str(version), "absent": absent}


def _offers(module: object, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def _messages(exc: BaseException) -> list[str]:
    """The texts of an exception and of what led to it."""
    found: list[str] = []
    cause: BaseException | None = exc
    while cause is not None and len(found) < 5:
        found.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    return found


if __name__ == "__main__":
    main()
