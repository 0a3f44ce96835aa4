"""How long to wait before another try over a network: what the server asks for, or longer after each failed one."""
import email.utils
import random
import re
import time

MAX_RETRY_AFTER = 120                   # seconds: who asks for more has a daily limit


def delay(failed, first=.5, r=random):
    """Seconds to wait after so many failed tries in a row: `first`, then twice as long each time, up to a minute; at
    random somewhat less, so that not all who failed together try again together."""
    return min(60, first * 2 ** min(failed, 30)) * r.uniform(.5, 1)


def retry_after(headers):
    """Seconds that a server asks for: retry-after-ms, or Retry-After as a number or a date; None for anything else."""
    said = headers.get("retry-after-ms", ""), headers.get("Retry-After", "")
    for text, unit in zip(said, (1e-3, 1)):
        if re.fullmatch(r"\d{1,9}(\.\d+)?", text.strip()):
            return float(text) * unit
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said[1]).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
