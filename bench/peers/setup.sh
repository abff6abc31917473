#!/usr/bin/env bash
# One virtual environment per peer tool: setup.sh TOOL... makes .venvs/TOOL from requirements/TOOL.txt.
#
# torch goes in first and is held there by a constraint, so no tool replaces it or brings CUDA packages. Which build
# of it that is, pip decides: with plain pip on Linux it is the CUDA one unless PIP_FIND_LINKS or PIP_INDEX_URL says otherwise.
# PYTHON names the interpreter (default python3). An environment that exists is brought up to date, not made anew.
set -euo pipefail

torch="torch==2.13.0"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
held="$(mktemp)"
trap 'rm -f "$held"' EXIT
echo "$torch" > "$held"

if [ $# -eq 0 ]; then
    echo "usage: setup.sh TOOL...   tools: $(basename -s .txt -a "$here"/requirements/*.txt | grep -v alone | xargs)" >&2
    exit 2
fi
for tool in "$@"; do
    wanted="$here/requirements/$tool.txt"
    [ -f "$wanted" ] || { echo "setup.sh: no $wanted" >&2; exit 2; }
done
for tool in "$@"; do
    venv="$here/.venvs/$tool"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet setuptools==84.2.1 wheel==0.48.0 "$torch"
    "$venv/bin/python" -m pip install --quiet --constraint "$held" --requirement "$here/requirements/$tool.txt"
    # A tool of which only some Python files are run, without all that it asks for.
    alone="$here/requirements/$tool.alone.txt"
    [ ! -f "$alone" ] || "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$alone"
    echo "$tool: $venv"
done
