package console

import (
	"fmt"
	"strings"
)

// Kind says what a port is connected to.
type Kind string

// The kinds of backend.
const (
	None  Kind = "none"  // discard output, no input
	Stdio Kind = "stdio" // the terminal or pipes that the process was started with
	File  Kind = "file"  // output appended to a file, no input
	Unix  Kind = "unix"  // a Unix socket that clients connect to
	PTY   Kind = "pty"   // a pseudo-terminal of the host
)

// MaxSocketPath is the longest path of a Unix socket in bytes: sun_path less its final NUL.
const MaxSocketPath = 107

// Spec is the parsed form of what a user writes for a port: "none", "stdio", "pty",
// "file:PATH", "unix:PATH". The zero Spec is none.
type Spec struct {
	Kind Kind
	Path string // for File and Unix
}

// ParseSpec parses the user's notation.
func ParseSpec(s string) (Spec, error) {
	kind, path, hasPath := strings.Cut(s, ":")
	switch k := Kind(kind); k {
	case None, Stdio, PTY:
		if hasPath {
			return Spec{}, fmt.Errorf("console: %q takes no path", kind)
		}
		return Spec{Kind: k}, nil
	case File, Unix:
		if path == "" {
			return Spec{}, fmt.Errorf("console: %q needs a path, as in %s:/some/path", s, kind)
		}
		if strings.ContainsRune(path, 0) {
			return Spec{}, fmt.Errorf("console: the path contains a NUL byte")
		}
		if k == Unix && len(path) > MaxSocketPath {
			return Spec{}, fmt.Errorf("console: socket path is %d bytes long, at most %d are possible", len(path), MaxSocketPath)
		}
		return Spec{Kind: k, Path: path}, nil
	}
	return Spec{}, fmt.Errorf("console: %q is none of stdio, file:PATH, unix:PATH, pty, none", s)
}

// String returns the notation that ParseSpec reads.
func (s Spec) String() string {
	switch s.Kind {
	case "":
		return string(None)
	case File, Unix:
		return string(s.Kind) + ":" + s.Path
	}
	return string(s.Kind)
}

// MarshalText implements encoding.TextMarshaler.
func (s Spec) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Spec) UnmarshalText(b []byte) error {
	p, err := ParseSpec(string(b))
	if err == nil {
		*s = p
	}
	return err
}
