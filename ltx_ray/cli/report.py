"""`ltx-ray report`: writes the page, and shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ltx_ray.cli.serve import report_server
from ltx_ray.dataset import layout
from ltx_ray.dataset.comparison import write_comparison
from ltx_ray.dataset.report import write_report
from ltx_ray.storage.locations import join
from ltx_ray.storage.store import Store

#: Hours for which Amazon's and Google's stores sign at most.
_MOST_HOURS = 7 * 24.0


def report(
    output: str, against: str | None, presign: float | None, serve: int | None, say: Callable[[str], None]
) -> None:
    """Write the report of `output`, or its comparison with `against`, and serve it.

    presign: hours for which links are signed. `serve`: a port. Raises ValueError for what does not go together,
    and for an output that cannot be written.
    """
    if presign is not None and not 0 < presign <= _MOST_HOURS:
        raise ValueError(f"--presign: {presign:g}, legal: hours above 0, up to {_MOST_HOURS:g}")
    if against is not None and serve is not None:
        raise ValueError("--against: with --serve, which shows one dataset; legal: without it")
    store = Store(output)
    store.check_writable("OUTPUT")
    with contextlib.ExitStack() as stack:
        server = None if serve is None else stack.enter_context(report_server(store, serve))
        seconds = None if presign is None else presign * 3600
        if against is not None:
            path, name = write_comparison(output, against, seconds), layout.COMPARISON
        else:
            path, name = write_report(output, signed_seconds=seconds), layout.REPORT
        say(path if store.is_local else join(store.name, name))
        if presign is not None:
            time = "1 hour" if presign == 1 else f"{presign:g} hours"
            say(f"for whoever has no credentials, for {time}: {store.signed_urls([name], presign * 3600)[0]}")
        if server is not None:
            say(f"http://127.0.0.1:{server.server_port}/ shows it and plays its clips, until Ctrl-C")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
