#!/usr/bin/env bash
# Run a command in a scratch folder where the package lies under its own name.
#
# The repository root is the package, so tools that find modules by path (mypy, doctest collection) need a folder called
# `instructgym`. It holds one link per part of the package: .venv, tests and scripts stay out of sight.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

mkdir "$scratch/instructgym"
ln -s "$root"/*.py "$root"/py.typed "$scratch/instructgym/"
for init in "$root"/*/__init__.py; do
    ln -s "$(dirname "$init")" "$scratch/instructgym/"
done

cd "$scratch"
"$@"
