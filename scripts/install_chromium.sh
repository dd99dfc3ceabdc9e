#!/usr/bin/env bash
# Debian's Chromium, in which tests open the report's page. Where it cannot be installed those tests are skipped.
set -euo pipefail

command -v chromium chromium-browser google-chrome >/dev/null && exit 0
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "no Chromium here: tests that open pages are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update && apt-get install --yes --no-install-recommends chromium; } >"$log" 2>&1; then
    tail -n 5 "$log"
    echo "Chromium could not be installed: tests that open pages are skipped"
fi
rm -f "$log"
