"""What a notebook needs beside commands: Colab's secrets in the environment, and a page shown below its cell."""
import contextlib
import html
import os
from pathlib import Path

SECRETS = ("HF_TOKEN", "OPENAI_API_KEY", "OPENAI_BASE_URL")


def secrets():
    """Put Colab's secrets into the environment, where commands look for them; elsewhere it stays as it is. Says which
    of SECRETS are set, and never what they are."""
    with contextlib.suppress(ImportError):              # not on Colab
        from google.colab import userdata
        for name in SECRETS:
            with contextlib.suppress(Exception):        # there is no such secret, or this notebook may not read it
                os.environ[name] = userdata.get(name)
    print(", ".join(f"{name} is {'set' if os.environ.get(name) else 'not set'}" for name in SECRETS))


class Page:
    """An HTML file, report.html perhaps, as a notebook shows it: in a frame of its own, which needs no server."""

    def __init__(self, path, height=700):
        self.path, self.height = Path(path), height

    def __repr__(self):
        return str(self.path)

    def _repr_html_(self):
        text = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{text}" style="width: 100%; height: {self.height}px; border: 0"></iframe>'
