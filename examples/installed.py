"""What the examples need beside torch: importing this says in one line what is missing."""

from importlib.util import find_spec

MISSING = [name for name in ("matplotlib", "rich", "tokenizers") if find_spec(name) is None]
if MISSING:
    raise SystemExit(f"error: {', '.join(MISSING)} missing: pip install 'pykernels[examples]'")
