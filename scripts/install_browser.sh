#!/bin/sh
# Debian's Chromium for the tests that open reports as a reader would. Does nothing where there is a browser or where it
# may not install one, and never fails: those tests are then skipped and say why.
skip() { echo "no Chromium ($1): tests that open reports in a browser will be skipped" >&2; exit 0; }

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
command -v apt-get >/dev/null 2>&1 || skip "no apt-get"
# Ubuntu's package of this name is an empty one that asks for a snap.
grep -q '^ID=debian' /etc/os-release 2>/dev/null || skip "this is not Debian"
[ "$(id -u)" = 0 ] || skip "not root"
export DEBIAN_FRONTEND=noninteractive
timeout 120 apt-get update >/dev/null 2>&1
timeout 600 apt-get install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1 \
    || skip "apt-get could not install it"
