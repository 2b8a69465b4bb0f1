#!/usr/bin/env bash
# Make Debian's Python binding of libnbd and its shell known to a virtual environment: alone, since the
# rest of dist-packages would shadow pinned packages. `setup.sh` calls it with .venv.
set -euo pipefail
venv=$1
debian=/usr/lib/python3/dist-packages

[ -e $debian/nbd.py ] || exit 0
dir=$(realpath "$venv")/lib/libnbd
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$dir"
# `nbdsh` runs `python3 -m nbd`, which needs its own module besides.
for file in $debian/nbd.py $debian/nbdsh.py $debian/libnbdmod*.so; do
    [ ! -e "$file" ] || ln -sf "$file" "$dir/"
done
echo "$dir" > "$packages/stripewell_libnbd.pth"
"$venv/bin/python" -c 'import nbd' 2>/dev/null ||
    echo "setup: python3-libnbd is for another Python than $venv's; tests that need it are skipped" >&2
