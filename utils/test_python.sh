#!/usr/bin/env bash
# Run the unit and contract tests with another Python in a new virtual environment.
# Usage: utils/test_python.sh [python3.12]
set -euo pipefail
python=${1:-python3.12}
cd "$(dirname "$0")/.."
venv=$(mktemp -d)/venv
trap 'rm -rf "$(dirname "$venv")"' EXIT
"$python" -m venv "$venv"
"$venv/bin/pip" install -q ".[test]"
PATH="$venv/bin:$PATH" "$venv/bin/pytest" tests/unit tests/contract
