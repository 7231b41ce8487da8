// Package open makes an arbiter from what a user wrote:
//
//	file:DIR                                a directory of this pair on storage that both hosts mount
//	etcd:HOST:PORT[,HOST:PORT…]?keys=DIR    an etcd cluster or a witness, with this side's keys
//
// Without keys, etcd must be on this host, and is spoken to without encryption: for tests.
package open

import (
	"io"
	"strings"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/etcd"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/file"
)

// maxEndpoints bounds the members that a specification names; an etcd cluster has seven at most.
const maxEndpoints = 7

// forms is the remedy for what is no specification.
const forms = "write file:DIR, or etcd:HOST:PORT?keys=DIR"

// Spec is a specification in parts.
type Spec struct {
	// Dir is the directory of a file arbiter, else empty.
	Dir string
	// Endpoints and Keys are those of an etcd arbiter, else empty.
	Endpoints []string
	Keys      string
}

// Parse takes a specification apart. Errors are of type [*arbiter.Error].
func Parse(spec string) (Spec, error) {
	kind, rest, _ := strings.Cut(spec, ":")
	switch {
	case spec == "":
		return Spec{}, arbiter.Errorf(arbiter.BadSpec, forms, "no arbiter is given")
	case kind == "file" && rest == "":
		return Spec{}, arbiter.Errorf(arbiter.BadSpec, "write file:DIR", "the arbiter %q names no directory", spec)
	case kind == "file":
		return Spec{Dir: rest}, nil
	case kind == "etcd":
		return parseEtcd(spec, rest)
	}
	return Spec{}, arbiter.Errorf(arbiter.BadSpec, forms, "there is no arbiter of the kind %q", spec)
}

func parseEtcd(spec, rest string) (Spec, error) {
	members, options, has := strings.Cut(rest, "?")
	var s Spec
	if has {
		var ok bool
		// The rest is a path as it stands: it may hold any character.
		if s.Keys, ok = strings.CutPrefix(options, "keys="); !ok || s.Keys == "" {
			return Spec{}, arbiter.Errorf(arbiter.BadSpec, "write ?keys=DIR", "the arbiter %q has the option %q, which does not exist", spec, options)
		}
	}
	s.Endpoints = strings.Split(members, ",")
	if len(s.Endpoints) > maxEndpoints {
		return Spec{}, arbiter.Errorf(arbiter.BadSpec, "name fewer members: each knows the record", "the arbiter %q has more than %d endpoints", spec, maxEndpoints)
	}
	for _, e := range s.Endpoints {
		if err := etcd.CheckEndpoint(e, s.Keys == ""); err != nil {
			return Spec{}, err
		}
	}
	return s, nil
}

// Arbiter opens the arbiter of a pair. It does not wait for it: an etcd that is away shows when it is asked. The
// closer gives back what it holds. Errors that a user can do something about are of type [*arbiter.Error].
func Arbiter(spec, pair string) (arbiter.Arbiter, io.Closer, error) {
	s, err := Parse(spec)
	if err != nil {
		return nil, nil, err
	}
	if s.Dir != "" {
		a, err := file.Open(s.Dir)
		if err != nil {
			return nil, nil, arbiter.Errorf(arbiter.NoStorage, "mount the storage that both hosts share, and make a directory for this pair on it", "%w", err)
		}
		return a, nothing{}, nil
	}
	a, err := etcd.Open(etcd.Config{Pair: pair, Endpoints: s.Endpoints, Keys: s.Keys})
	if err != nil {
		return nil, nil, err
	}
	return a, a, nil
}

// nothing is the closer of an arbiter that holds nothing.
type nothing struct{}

func (nothing) Close() error { return nil }
