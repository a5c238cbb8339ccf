# Helpers shared by the scripts in ci/. To be sourced, not run.
#
# RQCOW2_CACHE   where sources, object files and the cargo target directory
#                are kept, default ~/.cache/rqcow2 (or below XDG_CACHE_HOME)
# RQCOW2_JOBS    how many compilers run at once, default the number of CPUs
# RQCOW2_LOG_TAIL how many lines of a log are shown when a step fails
# shellcheck shell=bash

RQCOW2_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RQCOW2_CACHE=${RQCOW2_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rqcow2}
RQCOW2_JOBS=${RQCOW2_JOBS:-$(nproc)}
RQCOW2_PATCHES=$RQCOW2_ROOT/patches/10.0

mkdir -p "$RQCOW2_CACHE"
RQCOW2_CACHE=$(cd "$RQCOW2_CACHE" && pwd)
export RQCOW2_ROOT RQCOW2_CACHE RQCOW2_JOBS RQCOW2_PATCHES

# Progress goes to standard error: some scripts answer on standard output.
step() { printf '==> %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The command that makes the rest of its arguments run as root.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "not root and no sudo: run as root: $*"
    fi
}

# run_logged LOG COMMAND...: runs it with its output in LOG; shows the end of
# LOG if it fails.
run_logged() {
    local log=$1 status=0
    shift
    mkdir -p "$(dirname "$log")"
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        {
            printf 'error: failed with status %s: %s\n' "$status" "$*"
            printf '       the last lines of %s:\n' "$log"
            tail -n "${RQCOW2_LOG_TAIL:-60}" "$log"
        } >&2
        return "$status"
    fi
}

# with_lock NAME COMMAND...: runs it while no other process holds the lock
# NAME. In a subshell, without the descriptor, so that nothing the command
# leaves running keeps the lock.
with_lock() (
    mkdir -p "$RQCOW2_CACHE/locks"
    exec 8>"$RQCOW2_CACHE/locks/$1"
    if ! flock -n 8; then
        note "waiting for another build that holds the lock '$1'"
        flock 8
    fi
    shift
    "$@" 8>&-
)

# The version of an unpacked QEMU tree.
qemu_version() { tr -d '[:space:]' <"$1/VERSION"; }

# Short digest of the files named, or of standard input.
digest() { cat -- "$@" | sha256sum | cut -c1-12; }

# The names of the patches of the series, in order.
series() { sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$RQCOW2_PATCHES/series"; }

# One digest for the whole series: names do not count, contents and order do.
patches_digest() {
    local name
    for name in $(series); do
        [ -f "$RQCOW2_PATCHES/$name" ] || die "$name is in the series but not in $RQCOW2_PATCHES"
        cat "$RQCOW2_PATCHES/$name"
        [ ! -e "$RQCOW2_PATCHES/older/$name" ] || cat "$RQCOW2_PATCHES/older/$name"
    done | digest
}

# prune KEEP PREFIX: removes the directories whose path starts with the prefix,
# all but the KEEP that were used last (the time stamp of .used in each) and
# those used within the last hour: somebody may be building there.
prune() {
    local keep=$1 prefix=$2 dir
    for dir in "$prefix"*/; do
        [ -e "$dir/.used" ] && printf '%s\t%s\n' "$(stat -c %Y "$dir/.used")" "${dir%/}"
    done | sort -rn | tail -n +$((keep + 1)) |
        while IFS=$'\t' read -r used dir; do
            [ $(($(date +%s) - used)) -gt 3600 ] || continue
            note "removing $dir, not used any more"
            rm -rf -- "$dir"
        done || true
}

# Where rustup puts cargo, for shells that do not know it yet.
case ":$PATH:" in *":$HOME/.cargo/bin:"*) ;; *) PATH=$HOME/.cargo/bin:$PATH ;; esac

# What runs cargo with Miri, which a toolchain beside the usual one may have;
# fails where none has.
miri_cargo() {
    local try
    for try in cargo 'cargo +nightly'; do
        if $try miri --version >/dev/null 2>&1; then
            echo "$try"
            return
        fi
    done
    return 1
}
