// Package optionrom holds the option ROM of this project, built from the assembly
// source beside it by build.sh and committed, so that a build needs no assembler.
package optionrom

import _ "embed"

//go:generate ./build.sh

// Linux is the ROM through which SeaBIOS starts a kernel from fw_cfg; package boot
// fills the items that it reads.
//
//go:embed linux.bin
var Linux []byte
