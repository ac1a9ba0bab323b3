# shellcheck shell=bash
# Sourced by demo.sh and test.sh: creates .venv in the repository and installs the project into it.
# Usage: . launch/setup_env.sh [EXTRA]
#
# PYTHON selects the interpreter (default python3; 3.11 to 3.13).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"
python="${PYTHON:-python3}"

"$python" - <<'PY'
import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"error: PYTHON={sys.executable} is Python {version}; 3.11, 3.12 or 3.13 is needed (set PYTHON=...)")
PY

# Installs again only if the requirements changed since the last complete install.
wanted="$(cat setup.cfg pyproject.toml | cksum) ${extra}"
marker=".venv/.installed${extra:+-$extra}"
if [[ ! -x .venv/bin/python || "$(cat "$marker" 2>/dev/null)" != "$wanted" ]]; then
  echo "installing into .venv (once; a few minutes)"
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  echo "$wanted" > "$marker"
fi
export PATH="$PWD/.venv/bin:$PATH"
