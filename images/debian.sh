# shellcheck shell=bash
# Sourced: fetches Debian packages of a suite without installing them. The apt state is
# below $cache, so this needs no root, does not change the state of the machine, and
# gives the same kernels and tools on every distribution with apt.

# Suites that guests can run: Debian 12 and 13. The last one is the default.
guest_suites=(bookworm trixie)
# Kernel, QEMU and busybox of the lab: the versions that are known to work there.
lab_suite=bookworm
mirror=${HOST_AGENT_DEBIAN_MIRROR:-http://deb.debian.org/debian}
mirror_security=${HOST_AGENT_DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}
keyrings=/usr/share/keyrings

# keyring SUITE: prints the file of keys that verify the suite. A keyring package that is
# older than trixie has only bookworm's keys; they verify a newer keyring package.
keyring() {
  local dir=$keyrings
  if [ "$1" != bookworm ] && ! compgen -G "$keyrings/debian-archive-$1-automatic.*" >/dev/null; then
    dir=$(unpacked keyring debian-archive-keyring)$dir
  fi
  printf '%s/debian-archive-keyring.gpg\n' "$dir"
}

# debian_sources SUITE: prints the lines of sources.list.
debian_sources() {
  local suite=$1 signed
  signed="[signed-by=$(keyring "$suite")]"
  printf 'deb %s %s %s main\n' "$signed" "$mirror" "$suite" \
    "$signed" "$mirror" "$suite-updates" \
    "$signed" "$mirror_security" "$suite-security"
}

# private_apt SUITE PROGRAM ARG...: apt-get or apt-cache on the private state.
private_apt() {
  local state=$cache/apt-$1 program=$2
  shift 2
  "$program" -o Dir::State="$state" -o Dir::State::status=/dev/null -o Dir::Cache="$state" \
    -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
    -o APT::Architecture=amd64 -o APT::Architectures=amd64 -o Acquire::Languages=none \
    -o Acquire::Retries=3 -o APT::Sandbox::User="$(id -un)" "$@"
}

# private_update SUITE: updates the lists of packages, unless they are less than an hour
# old: a first run fetches kernels, QEMU and busybox one after the other.
private_update() {
  local state=$cache/apt-$1
  [ -z "$(find "$state/updated" -mmin -60 2>/dev/null)" ] || return 0
  mkdir -p "$state/lists/partial" "$state/archives/partial"
  debian_sources "$1" >"$state/sources.list"
  private_apt "$1" apt-get update
  touch "$state/updated"
}

# kernel_dir SUITE FLAVOUR: prints the directory of an unpacked Debian kernel and fetches
# the kernel if necessary. FLAVOUR: cloud for guests; generic for the lab, which needs 9p.
# `scripts/setup --refresh` fetches a newer one.
kernel_dir() {
  local meta dir=$cache/kernel-$1-$2
  case $2 in
    cloud) meta=linux-image-cloud-amd64 ;;
    generic) meta=linux-image-amd64 ;;
    *) die "kernel_dir: no such flavour: $2" ;;
  esac
  [ -e "$dir/version" ] || step "fetch the $2 kernel of $1 (unpacked, not installed)" fetch_kernel "$1" "$meta" "$dir" >&2
  printf '%s\n' "$dir"
}

fetch_kernel() {
  local suite=$1 meta=$2 dir=$3 package version
  private_update "$suite"
  package=$(private_apt "$suite" apt-cache depends "$meta" | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ && !n++ { print $2 }')
  [ -n "$package" ] || die "$meta names no kernel package"
  rm -rf "$dir" "$dir.partial"
  mkdir -p "$dir.partial"
  ( cd "$dir.partial" && private_apt "$suite" apt-get download "$package" \
    && dpkg-deb -x ./*.deb . && rm ./*.deb )
  version=${package#linux-image-}
  # The modules are in lib in Debian 12 and in usr/lib in Debian 13; versions of kmod
  # look in one or the other.
  if [ -d "$dir.partial/lib" ]; then
    mkdir -p "$dir.partial/usr/lib"
    ln -s ../../lib/modules "$dir.partial/usr/lib/modules"
  else
    ln -s usr/lib "$dir.partial/lib"
  fi
  PATH=$PATH:/usr/sbin:/sbin depmod -b "$dir.partial" "$version"
  extract_vmlinux "$dir.partial/boot/vmlinuz-$version" "$dir.partial/vmlinux"
  printf '%s\n' "$version" >"$dir.partial/version"
  mv "$dir.partial" "$dir"
}

# extract_vmlinux BZIMAGE OUT: writes the ELF kernel inside a bzImage. Fields of the setup
# header (Documentation/x86/boot.rst): setup_sects at 0x1f1, payload_offset at 0x248,
# payload_length at 0x24c.
extract_vmlinux() {
  local image=$1 out=$2 sects offset length magic decompress
  field() { od -An -t"$1" -j "$2" -N "$3" "$image" | tr -d ' '; }
  [ "$(field x4 514 4)" = 53726448 ] || die "$image is no bzImage"
  sects=$(field u1 497 1)
  [ "$sects" -gt 0 ] || sects=4
  offset=$(((sects + 1) * 512 + $(field u4 584 4)))
  length=$(field u4 588 4)
  magic=$(field x1 "$offset" 4)
  case $magic in
    1f8b*) decompress=(gzip -dc) ;;
    fd377a58) decompress=(xz --single-stream -dc) ;;
    28b52ffd) decompress=(zstd -dc) ;;
    02214c18) decompress=(lz4 -dc) ;;
    5d0000*) decompress=(xz --format=lzma -dc) ;;
    *) die "$image: payload of unknown compression (starts with $magic)" ;;
  esac
  # Except with gzip the last four bytes are the unpacked size, an error for the tools.
  [ "${decompress[0]}" = gzip ] || length=$((length - 4))
  dd if="$image" iflag=skip_bytes,count_bytes skip="$offset" count="$length" bs=1M status=none |
    "${decompress[@]}" >"$out"
  [ "$(od -An -tx1 -N4 "$out" | tr -d ' ')" = 7f454c46 ] || die "$image: the payload is no ELF file"
}

# kernel_modules DIR MODULE...: prints the files of the modules and their dependencies in
# load order, without those that are built in. The files may be compressed.
kernel_modules() {
  local dir=$1 module
  shift
  for module; do
    PATH=$PATH:/usr/sbin:/sbin modprobe -d "$dir" -C /dev/null -S "$(cat "$dir/version")" --show-depends "$module"
  done | sed -n 's/^insmod \([^ ]*\.ko[.xzgst]*\).*/\1/p' | awk '!seen[$0]++'
}

# put_module FILE DIR: writes the module without compression to DIR and prints its name.
put_module() {
  local name=${1##*/}
  name=${name%.ko*}.ko
  case $1 in
    *.ko) cp "$1" "$2/$name" ;;
    *.ko.xz) xz -dc "$1" >"$2/$name" ;;
    *.ko.zst) zstd -qdc "$1" >"$2/$name" ;;
    *) die "$1: module of unknown compression" ;;
  esac
  printf '%s\n' "$name"
}

# unpacked NAME PACKAGE...: prints the directory with these packages and all their
# dependencies, down to the C library, unpacked and not installed: the machine is not
# changed, and the programs, of $lab_suite, are the same on every machine.
unpacked() {
  local dir=$cache/unpacked-$1 name=$1
  shift
  if [ "$(cat "$dir/packages" 2>/dev/null)" != "$*" ]; then
    step "fetch $name (unpacked, not installed)" fetch_unpacked "$dir" "$@" >&2
  fi
  printf '%s\n' "$dir"
}

fetch_unpacked() {
  local dir=$1 deb
  shift
  private_update "$lab_suite"
  rm -rf "$dir" "$dir.partial"
  mkdir -p "$dir.partial/debs/partial"
  private_apt "$lab_suite" apt-get -o Dir::Cache::archives="$dir.partial/debs" -o Debug::NoLocking=1 \
    --no-install-recommends --download-only -y install "$@"
  for deb in "$dir.partial"/debs/*.deb; do dpkg-deb -x "$deb" "$dir.partial"; done
  rm -r "$dir.partial/debs"
  printf '%s\n' "$*" >"$dir.partial/packages"
  mv "$dir.partial" "$dir"
}

# static_busybox: prints the path of a static busybox; the machine's may be dynamic.
static_busybox() {
  local dir
  dir=$(unpacked busybox busybox-static)
  printf '%s/bin/busybox\n' "$dir"
}

# promtool: prints the path of promtool. Its package has 19 MB and a server, which would
# start when it is installed; of its 100 MB only this program is unpacked.
promtool() {
  [ -x "$cache/promtool/promtool" ] || step "fetch promtool (unpacked, not installed)" fetch_promtool >&2
  printf '%s/promtool/promtool\n' "$cache"
}

fetch_promtool() {
  local dir=$cache/promtool
  private_update "$lab_suite"
  rm -rf "$dir" "$dir.partial"
  mkdir -p "$dir.partial"
  ( cd "$dir.partial" && private_apt "$lab_suite" apt-get download prometheus \
    && dpkg-deb --fsys-tarfile ./*.deb | tar -x --strip-components=3 ./usr/bin/promtool && rm ./*.deb )
  mv "$dir.partial" "$dir"
}

# lab_tools: prints the directory with QEMU for the lab and `qemu-system-x86_64`, a script
# that starts it.
lab_tools() {
  local dir
  dir=$(unpacked lab-tools qemu-system-x86)
  # QEMU needs the dynamic linker of its own C library. The linker in lib64 is a symbolic
  # link to that of the machine.
  cat >"$dir/qemu.partial" <<END
#!/bin/sh
d='${dir//\'/\'\\\'\'}'
export QEMU_MODULE_DIR="\$d/usr/lib/x86_64-linux-gnu/qemu"
exec "\$d/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" \\
  --library-path "\$d/lib/x86_64-linux-gnu:\$d/usr/lib/x86_64-linux-gnu" \\
  "\$d/usr/bin/qemu-system-x86_64" -L "\$d/usr/share/qemu" -L "\$d/usr/share/seabios" "\$@"
END
  chmod 755 "$dir/qemu.partial"
  mv "$dir/qemu.partial" "$dir/qemu-system-x86_64"
  printf '%s\n' "$dir"
}
