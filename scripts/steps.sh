# shellcheck shell=bash
# Sourced by the other scripts: directories, progress of steps, missing packages.
# Sets: project, target, cache, rust, memory_tree, installed.

# Without it a command substitution ignores `set -e`.
shopt -s inherit_errexit

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ -e "$project/Cargo.toml" ]; then
  installed=''
  target=$project/target
  data=$target/data
else
  # $project is PREFIX/lib/host-agent, written by scripts/install. The directories are
  # those of the user (host-agent/src/store/paths.rs).
  installed=1
  target=${XDG_CACHE_HOME:-${HOME:?}/.cache}/host-agent
  data=${XDG_DATA_HOME:-${HOME:?}/.local/share}/host-agent
fi
cache=$target/cache
rust=$target/rust
# A root file system is unpacked here, in memory. If a kill -9 leaves it behind, the next
# run or scripts/clean removes it.
memory_tree=/dev/shm/host-agent-$(id -u)-$(sha256sum <<<"$project" | head -c 12)
export HOST_AGENT_DATA_DIR=${HOST_AGENT_DATA_DIR:-$data}
mkdir -p "$cache" "$target/logs"

say() { printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# now: seconds since the epoch with a fraction. since START: the time since then.
now() { printf '%s' "${EPOCHREALTIME/,/.}"; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f s", b - a }'; }

# lock NAME: waits until no other script of this project holds the lock, and takes it
# until unlock or the end of this script. Commands of a step do not inherit it.
lock() {
  exec 9>"$target/$1.lock"
  flock -n 9 || { say "waiting for another script of this project to end ($1)"; flock 9; }
}
unlock() { exec 9>&-; }

# step TITLE COMMAND...: runs COMMAND with its output in a log file and shows the title
# and the time it took; on failure also the end of the log. VERBOSE=1 shows the output.
# Do not call `step` in a condition: bash then ignores `set -e` in a COMMAND that is a
# function.
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

# as_root COMMAND...: runs COMMAND as root, by sudo if necessary.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo -- "$@"
  else
    die "this needs root and there is no sudo; as root, run: $*"
  fi
}

# need PROGRAM PACKAGE WHY: adds PACKAGE to `missing` if PROGRAM is not installed.
missing=()
need() {
  PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null && return
  missing+=("$2")
  say "missing: $2 ($3)"
}

# install_missing: installs the packages in `missing` by one call of apt-get.
install_missing() {
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "no apt-get here; install these yourself: ${missing[*]}"
  # sudo asks for the password now, before the progress line is drawn.
  if [ "$(id -u)" != 0 ] && [ -t 0 ] && command -v sudo >/dev/null; then sudo -v; fi
  step "install ${missing[*]}" install_packages "${missing[@]}"
  missing=()
}
install_packages() {
  # Wait for another apt (an automatic upgrade), and never remove a package.
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
  local install=("${apt[@]}" install -y --no-remove --no-install-recommends)
  as_root "${install[@]}" "$@" || { as_root "${apt[@]}" update && as_root "${install[@]}" "$@"; }
}

# use_rust: selects the Rust toolchain that scripts/setup installed below target/; if
# there is none, the user's, and then the distribution's.
use_rust() {
  if [ -x "$rust/cargo/bin/cargo" ]; then
    unset RUSTUP_TOOLCHAIN
    export CARGO_HOME=$rust/cargo RUSTUP_HOME=$rust/rustup PATH=$rust/cargo/bin:$PATH
  elif [ -x "${HOME:-}/.cargo/bin/cargo" ]; then
    export PATH=$HOME/.cargo/bin:$PATH
  fi
}
use_rust

# kvm_usable: whether this machine can run guests, as `doctor` reports.
kvm_usable() { "${HOST_AGENT_BIN:?}" doctor >/dev/null 2>&1; }

# Directory of the release binaries (see .cargo/config.toml).
release=$target/x86_64-unknown-linux-gnu/release

# Directory of the Python environment with schemathesis, which scripts/setup makes.
schemathesis=$cache/schemathesis

# Directory of the Node.js packages that drive a browser, which scripts/setup installs.
browser_modules=$cache/browser-modules

# project_version: the version of all programs.
project_version() { sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' "$project/Cargo.toml"; }

# build_guest_agents: builds the programs that run in guests, in $guest_programs.
guest_programs=$(dirname "$release")/guest
build_guest_agents() {
  command -v cargo >/dev/null || die "there is no Rust toolchain to build the guest agents with; run: $project/scripts/setup --build"
  # Panics name source files. Without this machine's directories in their names, every
  # machine builds the same programs.
  local remap="target.x86_64-unknown-linux-gnu.rustflags=[
    '--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo', '--remap-path-prefix=$project=/project']"
  step "build the guest agents" cargo build --profile guest --locked -p guest-agent --config "$remap"
}
