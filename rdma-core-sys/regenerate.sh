#!/bin/sh
# Makes src/verbs.rs from the installed libibverbs-dev. Needs bindgen 0.73 (cargo install bindgen-cli) and libclang.
# The result is checked in, so that building the project needs neither.
set -eu
cd "$(dirname "$0")"
header=$(mktemp --suffix=.h)
trap 'rm -f "$header"' EXIT
echo '#include <infiniband/verbs.h>' >"$header"
"${BINDGEN:-bindgen}" "$header" --output src/verbs.rs \
    --allowlist-type '(ibv|verbs)_.*' --allowlist-type '_compat_.*' --allowlist-var 'IBV_.*' \
    --blocklist-type 'pthread_.*|__pthread.*|timespec|_IO_.*|FILE' --opaque-type 'ibv_flow.*spec.*' \
    --ignore-functions --impl-debug --use-core --no-doc-comments --default-enum-style consts --no-prepend-enum-name \
    --raw-line 'use libc::{pthread_cond_t, pthread_mutex_t, timespec};' \
    --rust-target 1.85 --rust-edition 2024
