"""Which NBD error a refused or failed request is answered with. Pure.

Invariant: only the values that the specification lists reach the wire, and ESHUTDOWN only when the
export was deleted: a QEMU guest sees it as a final write error, even with `reconnect-delay`.
"""

from __future__ import annotations

import errno

from nbd_server.constants import EINVAL, EIO, ENOMEM, ENOSPC, ENOTSUP, EPERM, ESHUTDOWN

_WIRE_ERRORS = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EINVAL,
    errno.ENOTSUP: EINVAL,
}


class ProtocolError(Exception):
    """The client broke the protocol in a way that leaves nothing but to close its connection."""


def wire_error(error: Exception, *, deleted: bool, fast: bool = False) -> int:
    """The NBD error for what an export raised; anything unknown is EIO, and ENOTSUP is only for a
    client that asked for something `fast`."""
    if deleted:
        return ESHUTDOWN
    if fast and isinstance(error, OSError) and error.errno == errno.ENOTSUP:
        return ENOTSUP
    if isinstance(error, OSError) and error.errno is not None:
        return _WIRE_ERRORS.get(error.errno, EIO)
    return EIO
