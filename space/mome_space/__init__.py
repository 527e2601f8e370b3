"""The Space of MoME: search, captions, classification and routing in a browser, and the same as an API.

    app.py ── interface.py ──┬─ search.py, caption.py, classify.py, routing.py   a tab each, with its API endpoint
                             ├─ engine.py     the model: embeddings, captions, labels, experts
                             ├─ gallery.py    the pictures that can be searched, and their embeddings
                             ├─ uploads.py    what visitors send, and in which words it is refused
                             ├─ markup.py     pieces of HTML
                             └─ style.py      theme, CSS, script

The folder needs nothing of the repository but a checkpoint, whose code lies beside its weights. Everything that is
written (uploads, the model's code, embeddings) lies in `TEMP_FOLDER`; the settings below are read when gradio and
transformers are imported, and so stand before them.
"""

import getpass
import os
import tempfile
from pathlib import Path

# By number where users have one: in a container the number may have no name, and the user no home.
OWNER = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
TEMP_FOLDER = Path(tempfile.gettempdir()) / f"mome-space-{OWNER}"
TEMP_FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
HOME = Path(os.path.expanduser("~"))  # "~" where there is none
if not (HOME.is_dir() and os.access(HOME, os.W_OK)):
    os.environ.setdefault("HF_HOME", str(TEMP_FOLDER / "huggingface"))
os.environ.setdefault("LOGNAME", str(OWNER))  # torch asks for a name to cache under

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_TEMP_DIR", str(TEMP_FOLDER / "uploads"))
os.environ.setdefault("HF_MODULES_CACHE", str(TEMP_FOLDER / "modules"))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
