#!/bin/sh
# Environments for trainers that pin many versions, and our tests in each: adapters_environments.sh PYTHON FOLDER [NAME ...]
#
# PYTHON is that of the development environment, whose packages (torch among them) each new one shares; it puts only
# what differs in front of them. NAME is axolotl, llamafactory or ms_swift; all three without one.
set -eu

python=$1 folder=$2
shift 2
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
root=$(dirname "$0")/..
failed=0

for name in ${*:-axolotl llamafactory ms_swift}; do
	own=$folder/$name
	if ! cmp -s "$root/tests/adapters/$name.txt" "$own/installed.txt"; then
		rm -rf "$own"
		"$python" -m venv "$own"
		"$own/bin/python" -m pip install --quiet --no-deps -r "$root/tests/adapters/$name.txt"
		own_site=$("$own/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
		echo "$site" >"$own_site/zz_shared.pth"
		# Built for CUDA, and torchaudio does not import where it cannot be loaded. No test needs sound.
		rm -f "$own_site"/torchaudio/lib/_torchaudio*.so
		cp "$root/tests/adapters/$name.txt" "$own/installed.txt"
	fi
	(cd "$root" && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$PWD "$own/bin/python" -m pytest -q -s \
		"tests/adapters/test_$name.py") || failed=1
done
exit $failed
