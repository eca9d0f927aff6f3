#!/bin/bash
# Derives the private-ABI tables from the sources of every rdma-core release and holds the provider's tables against them.
#
#   provider/src/release/check-against-sources.sh RDMA_CORE_GIT [COMMIT...]
#
# RDMA_CORE_GIT is a clone (bare or not) of https://github.com/linux-rdma/rdma-core with its tags. Without COMMITs, every
# tag from v36.0 on is checked. Needs git, a C compiler and cargo. Prints one line a release; ends 0 if everything agrees.
set -euo pipefail

source_git=$(git -C "${1:?usage: $0 RDMA_CORE_GIT [COMMIT...]}" rev-parse --absolute-git-dir)
shift
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ $# -gt 0 ]; then
    commits=("$@")
else
    mapfile -t commits < <(git --git-dir="$source_git" tag --list 'v[3-9][0-9].*' | sort --version-sort | awk -F'[v.]' '$2 >= 36')
fi

# The slots of verbs_context_ops in order, as `slot.INDEX=NAME`, with each one's prototype as `prototype.NAME=...`.
slots() {
    awk '/^struct verbs_context_ops \{/ { inside = 1; next } /^\};/ { inside = 0 } inside' |
        tr -s ' \t\n' ' ' | tr ';' '\n' | sed -E 's/^ //; /^$/d' |
        awk '{ match($0, /\(\*[a-z_0-9]+\)/); name = substr($0, RSTART + 2, RLENGTH - 3)
               printf "slot.%d=%s\n", NR - 1, name; gsub(/\( /, "("); printf "prototype.%s=%s\n", name, $0 }'
}

facts_of() {
    local commit=$1 tree="$work/tree" version suffix library
    rm -rf "$tree"
    mkdir -p "$tree/include/infiniband"
    git --git-dir="$source_git" archive "$commit" CMakeLists.txt libibverbs kernel-headers ccan util | tar -x -C "$tree"
    ln -s "$tree"/libibverbs/*.h "$tree/kernel-headers/rdma/ib_user_ioctl_verbs.h" "$tree/include/infiniband/"
    ln -s ../ccan "$tree/include/ccan"
    ln -s ../util "$tree/include/util"
    ln -s ../kernel-headers/rdma "$tree/include/rdma"
    version=$(sed -nE 's/^set\(PACKAGE_VERSION "([0-9.]+)"\).*/\1/ip' "$tree/CMakeLists.txt")
    suffix=$(sed -nE 's/^set\(IBVERBS_PABI_VERSION "([0-9]+)"\).*/\1/ip' "$tree/CMakeLists.txt")
    library=$(sed -nE 's/^ *1 (1\.[0-9]+)\.\$\{PACKAGE_VERSION\}.*/\1/p' "$tree/libibverbs/CMakeLists.txt")
    printf '#define IBVERBS_PABI_VERSION %s\n#define HAVE_TYPEOF 1\n#define HAVE_STATEMENT_EXPR 1\n' "$suffix" >"$tree/include/config.h"

    printf 'release=%s\nsuffix=%s\nlibrary=%s\n' "$version" "$suffix" "$library"
    # Which public symbol versions exist, and the first symbol of each: the run-time cross-check asks for them.
    awk '/^IBVERBS_1\.[0-9]+ \{/ { version = $1; next } /^\}/ { version = "" }
         version != "" && /^\t\t[a-z_0-9]+;/ && !seen[version]++ { sub(/;/, "", $1); printf "symbol.%s=%s\n", version, $1 }' \
        "$tree/libibverbs/libibverbs.map.in"
    awk '/^IBVERBS_PRIVATE/ { inside = 1 } inside && /^\t\t[a-z_0-9]+;/ { sub(/;/, "", $1); printf "private.%s=yes\n", $1 }' \
        "$tree/libibverbs/libibverbs.map.in" | grep -E '=yes$' |
        grep -E '^private\.(_verbs_init_and_alloc_context|verbs_set_ops|verbs_uninit_context|ibv_get_sysfs_path)=' || true
    slots <"$tree/libibverbs/driver.h"
    sed -nE 's/^\s*RDMA_DRIVER_([A-Z0-9_]+)( = ([0-9]+))?,?.*/\1 \3/p' "$tree/kernel-headers/rdma/ib_user_ioctl_verbs.h" |
        awk -v id=-1 '{ id = NF > 1 ? $2 : id + 1; printf "driver.%s=%d\n", $1, id }'
    "${CC:-cc}" -D_GNU_SOURCE -DKERN_ABI_H -w -I "$tree/include" -I "$tree/kernel-headers" -I "$tree" -o "$work/probe" "$here/abi-probe.c"
    "$work/probe"
}

mkdir "$work/facts"
for commit in "${commits[@]}"; do
    facts_of "$commit" >"$work/facts/${commit//\//_}"
done

if [ -n "${FACTS_ONLY:-}" ]; then
    cp "$work"/facts/* "$FACTS_ONLY"/
    exit 0
fi
REVERBS_RELEASE_FACTS="$work/facts" cargo test --quiet --manifest-path "$here/../../Cargo.toml" --test release_facts -- --nocapture
