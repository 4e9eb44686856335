#!/bin/sh
# Debian packages of the shim, from a program that was built already:
#
#   build.sh PROGRAM VERSION FOLDER
#
# onequote-shim: program and service. onequote-shim-initramfs: starts it from the initramfs, before anything of the disk runs.
# Needs dpkg-deb and no root; the same input gives the same packages.
set -eu

program=$1 version=$2 folder=$3
here=$(dirname "$0")
shim=$here/..
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

# Files by the packages' times would be other packages each time.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1704067200}
export SOURCE_DATE_EPOCH

put() { # put MODE FILE IN-THE-PACKAGE
    install -D -m "$1" "$2" "$root/$3"
}

pack() { # pack NAME ARCHITECTURE DEPENDS DESCRIPTION
    mkdir -p "$root/DEBIAN"
    cat >"$root/DEBIAN/control" <<CONTROL
Package: $1
Version: $version
Architecture: $2
Maintainer: Onequote <onequote@localhost>
Section: admin
Priority: optional
${3:+Depends: $3
}Description: $4
CONTROL
    put 644 "$shim/../LICENSE-MIT" "usr/share/doc/$1/copyright"
    find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    dpkg-deb --root-owner-group -Zxz --build "$root" "$folder/$1_${version}_$2.deb" >/dev/null
}

root=$tree/shim
put 755 "$program" usr/sbin/onequote-shim
sed 's|/usr/local/sbin/|/usr/sbin/|' "$shim/systemd/onequote-shim.service" >"$tree/service"
put 644 "$tree/service" lib/systemd/system/onequote-shim.service
for script in postinst prerm; do put 755 "$here/$script" "DEBIAN/$script"; done
pack onequote-shim amd64 "" "streams the kernel's IMA list from a guest to its host
 The program opens the list of what the kernel has measured and sends new entries
 over vsock to the proxy on the host, which binds them to the host's TPM."

root=$tree/initramfs
sed 's|/usr/local/sbin/|/usr/sbin/|' "$shim/initramfs-tools/hooks/onequote-shim" >"$tree/hook"
put 755 "$tree/hook" usr/share/initramfs-tools/hooks/onequote-shim
put 755 "$shim/initramfs-tools/scripts/init-top/onequote-shim" \
    usr/share/initramfs-tools/scripts/init-top/onequote-shim
for script in postinst postrm; do put 755 "$here/initramfs.$script" "DEBIAN/$script"; done
pack onequote-shim-initramfs all "onequote-shim, initramfs-tools" "starts the Onequote shim from the initramfs
 The shim then runs before anything of the guest's disk does, and its program is
 measured with the initramfs by the host instead of by the guest's kernel."
