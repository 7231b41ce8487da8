package config

import "strings"

// Code is the stable reason of a refusal, for programs.
type Code string

// The codes.
const (
	BadSyntax        Code = "bad-syntax"    // the file is not TOML or JSON
	UnknownKey       Code = "unknown-key"   // no such setting
	BadValue         Code = "bad-value"     // not of the setting's type or outside its range
	Conflict         Code = "conflict"      // two settings that exclude each other
	Unsupported      Code = "not-supported" // a sensible value that this version cannot do
	MemoryTooSmall   Code = "memory-too-small"
	MemoryTooLarge   Code = "memory-too-large"
	TooMany          Code = "too-many"        // more disks, NICs or ports than the machine has room for
	FileUnreadable   Code = "file-unreadable" // the configuration file
	KernelNotFound   Code = "kernel-not-found"
	InitrdNotFound   Code = "initrd-not-found"
	ImageNotFound    Code = "image-not-found" // a disk image
	FirmwareNotFound Code = "firmware-not-found"
	ROMNotFound      Code = "rom-not-found"   // a NIC's option ROM
	GuestNotFound    Code = "guest-not-found" // no embedded guest of that name
	NoPermission     Code = "no-permission"   // a file exists and may not be used
	NothingToBoot    Code = "nothing-to-boot"
)

// Error is one refusal.
type Error struct {
	Code    Code   `json:"code"`
	Key     string `json:"key,omitempty"`   // the setting, such as "disk[0].path"; empty if it is about the whole
	Where   string `json:"where,omitempty"` // file and line, flag or variable
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
}

// Error returns place, setting and message in one line, without code and remedy.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Where != "" {
		b.WriteString(e.Where + ": ")
	}
	if e.Key != "" {
		b.WriteString(e.Key + ": ")
	}
	b.WriteString(e.Message)
	return b.String()
}

// Errors is everything that is wrong, in the order of the settings; never empty when returned as
// an error.
type Errors []*Error

// Error returns all errors, one a line.
func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns the errors one by one, for errors.As.
func (es Errors) Unwrap() []error {
	out := make([]error, len(es))
	for i, e := range es {
		out[i] = e
	}
	return out
}

// err returns es as an error, nil if it is empty.
func (es Errors) err() error {
	if len(es) == 0 {
		return nil
	}
	return es
}
