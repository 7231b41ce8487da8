#!/bin/sh
# Builds linux.bin from linux.S with GNU binutils: build.sh [OUTPUT]
set -eu
cd "$(dirname "$0")"
out=${1:-linux.bin}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
as --32 -o "$tmp/rom.o" linux.S
ld -m elf_i386 -Ttext=0 --oformat=binary -o "$tmp/rom" "$tmp/rom.o"
truncate -s 512 "$tmp/padded"
dd if="$tmp/rom" of="$tmp/padded" conv=notrunc status=none

# complement FILE START LENGTH AT makes LENGTH bytes from START on sum to zero by the byte AT.
complement() {
	byte=$(od -An -v -tu1 -j "$2" -N "$3" "$1" | awk '{ for (i = 1; i <= NF; i++) s += $i } END { print (256 - s % 256) % 256 }')
	printf "\\$(printf %03o "$byte")" | dd of="$1" bs=1 seek="$4" conv=notrunc status=none
}
complement "$tmp/padded" 32 32 41 # the Plug and Play header
complement "$tmp/padded" 0 512 511
if [ "$(wc -c <"$tmp/rom")" -gt 511 ]; then
	echo "linux.S takes more than 511 bytes" >&2
	exit 1
fi
mv "$tmp/padded" "$out"
chmod 644 "$out"
