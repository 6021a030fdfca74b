# shellcheck shell=bash
# Sourced by the scripts: where things lie, how a step is shown, which packages
# are needed. Sets: project, target, cache, rust, memory_tree.

# A command substitution stops at its first error, as all else does.
shopt -s inherit_errexit

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
target=$project/target
cache=$target/cache
rust=$target/rust
# Where a root file system is unpacked, in memory: what is there after a kill -9, the
# next run or scripts/clean removes.
memory_tree=/dev/shm/host-agent-$(id -u)-$(sha256sum <<<"$project" | head -c 12)
export HOST_AGENT_DATA_DIR=${HOST_AGENT_DATA_DIR:-$target/data}
mkdir -p "$cache" "$target/logs"

say() { printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Seconds since the epoch with a fraction; seconds between two of them.
now() { printf '%s' "${EPOCHREALTIME/,/.}"; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f s", b - a }'; }

# lock NAME: waits until no other script of this project holds the lock. It is held
# until unlock or the end of this script, and never by what a step leaves running.
lock() {
  exec 9>"$target/$1.lock"
  flock -n 9 || { say "waiting for another script of this project to end ($1)"; flock 9; }
}
unlock() { exec 9>&-; }

# step TITLE COMMAND...: runs COMMAND with its output in a log file, shows what
# is running and how long it took; on failure shows the end of the log.
# VERBOSE=1 shows the output as well. A COMMAND that is a function stops at its
# first error only if `step` is not itself part of a condition (bash ignores
# `set -e` in all that a condition calls): end such a script by `step`, don't test it.
step() {
  local title=$1 start log rc ticker=
  shift
  start=$(now)
  log=$target/logs/$(tr -cs 'a-zA-Z0-9\n' - <<<"${title,,}").log
  if [ -n "${VERBOSE:-}" ]; then
    say "-- $title"
    set +e; ( set -e; "$@" ) </dev/null 9>&- 2>&1 | tee "$log" >&2; rc=${PIPESTATUS[0]}; set -e
  else
    if [ -t 2 ]; then
      ( while :; do printf '\r\033[K%s ... %s' "$title" "$(since "$start")" >&2; sleep 1; done ) 9>&- &
      ticker=$!
    fi
    set +e; ( set -e; "$@" ) >"$log" 2>&1 </dev/null 9>&-; rc=$?; set -e
    if [ -n "$ticker" ]; then
      kill "$ticker" 2>/dev/null || :
      wait "$ticker" 2>/dev/null || :
      printf '\r\033[K' >&2
    fi
  fi
  if [ "$rc" -ne 0 ]; then
    say "$title: failed after $(since "$start")"
    if [ -z "${VERBOSE:-}" ]; then
      tail -n 40 "$log" | sed 's/^/  | /' >&2
      say "  whole log: $log"
    fi
    return "$rc"
  fi
  say "$title: $(since "$start")"
}

# as_root COMMAND...: directly, or by sudo.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo -- "$@"
  else
    die "this needs root and there is no sudo; as root, run: $*"
  fi
}

# need PROGRAM PACKAGE WHY: remembers PACKAGE when PROGRAM is not installed.
missing=()
need() {
  PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null && return
  missing+=("$2")
  say "missing: $2 ($3)"
}

# install_missing: installs what need() found missing, in one go.
install_missing() {
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "no apt-get here; install these yourself: ${missing[*]}"
  # Ask for the password before the progress line is drawn.
  if [ "$(id -u)" != 0 ] && [ -t 0 ] && command -v sudo >/dev/null; then sudo -v; fi
  step "install ${missing[*]}" install_packages "${missing[@]}"
  missing=()
}
# Never at the price of a package that is there.
install_packages() {
  # Another installation may be under way, of updates for one.
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
  local install=("${apt[@]}" install -y --no-remove --no-install-recommends)
  as_root "${install[@]}" "$@" || { as_root "${apt[@]}" update && as_root "${install[@]}" "$@"; }
}

# use_rust: takes the Rust toolchain that scripts/setup installed below target/ if
# it did, else the user's own before the distribution's.
use_rust() {
  if [ -x "$rust/cargo/bin/cargo" ]; then
    unset RUSTUP_TOOLCHAIN
    export CARGO_HOME=$rust/cargo RUSTUP_HOME=$rust/rustup PATH=$rust/cargo/bin:$PATH
  elif [ -x "${HOME:-}/.cargo/bin/cargo" ]; then
    export PATH=$HOME/.cargo/bin:$PATH
  fi
}
use_rust

# kvm_usable: can this machine itself run guests? Asked of the product.
kvm_usable() { "${HOST_AGENT_BIN:?}" doctor >/dev/null 2>&1; }

# Where cargo puts the release binaries (see .cargo/config.toml).
release=$target/x86_64-unknown-linux-gnu/release
