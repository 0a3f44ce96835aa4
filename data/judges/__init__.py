"""How a judge is asked: prompts and verdicts, an HTTP client, and the file of everything it ever answered."""
from data import Refusal


class JudgeError(Refusal):
    """The judge refuses, is down, is out of quota or talks nonsense. All that it answered is in the cache."""
    code = 3
