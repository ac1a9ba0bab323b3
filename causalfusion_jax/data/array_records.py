"""Records of ArrayRecord files; errors of the system are distinguished from damaged records."""

import errno
import os
import re
from collections.abc import Sequence

from causalfusion_jax.common import files

_FAILED_CALL = re.compile(r"\w+\(\) failed: ([^;]*)")
"""A failed system call as reported by Riegeli, which reads the files: `open() failed: Too many open files; ...`"""


def read_record(records: Sequence[bytes], index: int) -> bytes:
    """A record as bytes.

    Args:
      records: an ArrayRecordDataSource, which raises RuntimeError for all errors.
      index: index of the record.

    Raises:
      OSError: the system could not read it.
      RuntimeError: it is damaged.
    """
    return files.retry_io(lambda: _read(records, index))


def _read(records: Sequence[bytes], index: int) -> bytes:
    try:
        return records[index]
    except RuntimeError as error:
        failed = _FAILED_CALL.search(str(error))
        if failed is None:
            raise
        known = {os.strerror(number): number for number in errno.errorcode}
        raise OSError(known.get(failed[1].strip(), errno.EIO), str(error)) from None
