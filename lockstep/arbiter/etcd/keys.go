package etcd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
)

// The files of one side's credentials. Their names leave room in the directory for the keys of the
// link, so that a host has one directory for a pair.
const (
	AuthorityFile   = "witness.pem"      // who signs the members' certificates
	CertificateFile = "witness-cert.pem" // this side's certificate; its common name is its user in etcd
	KeyFile         = "witness-key.pem"  // this side's private key
)

// Scheme is that of the URI in a certificate that a witness granted, which names pair and side:
// "ftvmm-witness:NAME/a".
const Scheme = "ftvmm-witness"

// maxKeyFile bounds what is read of a key file, in bytes.
const maxKeyFile = 64 << 10

// grantRemedy says how to get good keys.
const grantRemedy = "make keys for this pair with ftvmm witness grant"

// LoadTLS reads the credentials of one side of a pair: what ftvmm witness grant made, or files of the same
// names for an etcd cluster with an authority of its own.
func LoadTLS(dir, pair string) (*tls.Config, error) {
	authority, err := ReadKeyFile(filepath.Join(dir, AuthorityFile), false)
	if err != nil {
		return nil, err
	}
	certificate, err := ReadKeyFile(filepath.Join(dir, CertificateFile), false)
	if err != nil {
		return nil, err
	}
	secret, err := ReadKeyFile(filepath.Join(dir, KeyFile), true)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		return nil, arbiter.Errorf(arbiter.BadKeys, grantRemedy, "%s holds no certificate", filepath.Join(dir, AuthorityFile))
	}
	own, err := tls.X509KeyPair(certificate, secret)
	if err != nil {
		return nil, arbiter.Errorf(arbiter.BadKeys, grantRemedy, "the keys for the arbiter in %s: %w", dir, err)
	}
	for _, u := range own.Leaf.URIs {
		if name, _, _ := strings.Cut(u.Opaque, "/"); u.Scheme == Scheme && name != pair {
			return nil, arbiter.Errorf(arbiter.BadKeys, grantRemedy, "the keys for the arbiter in %s are those of the pair %q, not of %q", dir, name, pair)
		}
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{own}}, nil
}

// ReadKeyFile reads a file in PEM, and refuses a secret that others than its owner may read.
func ReadKeyFile(path string, secret bool) ([]byte, error) {
	st, err := os.Stat(path)
	switch {
	case err != nil:
		remedy := grantRemedy
		if errors.Is(err, os.ErrPermission) {
			remedy = "change the owner, or use another user"
		}
		return nil, arbiter.Errorf(arbiter.BadKeys, remedy, "reading keys for the arbiter: %w", err)
	case st.Size() > maxKeyFile:
		return nil, arbiter.Errorf(arbiter.BadKeys, grantRemedy, "%s is too large to be a key", path)
	case secret && st.Mode().Perm()&0o077 != 0:
		return nil, arbiter.Errorf(arbiter.KeysReadable, "run chmod 600 on the file", "others than the owner may use %s (mode %04o)", path, st.Mode().Perm())
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, arbiter.Errorf(arbiter.BadKeys, "change the owner, or use another user", "reading keys for the arbiter: %w", err)
	}
	return data, nil
}

// CheckEndpoint refuses what is not "host:port", and if plain is set, when there is no encryption, a host that is
// not this one.
func CheckEndpoint(endpoint string, plain bool) error {
	host, port, err := net.SplitHostPort(endpoint)
	if err == nil && host == "" {
		err = errors.New("the host is missing")
	}
	if err == nil && strings.ContainsAny(host, "/@?# ") {
		err = errors.New("the host has a character that no host has")
	}
	if err == nil {
		if n, e := strconv.ParseUint(port, 10, 16); e != nil || n == 0 {
			err = fmt.Errorf("%q is no port", port)
		}
	}
	if err != nil {
		return arbiter.Errorf(arbiter.BadSpec, "write HOST:PORT, as in witness.example:2379 or [2001:db8::7]:2379", "%q is no endpoint of an arbiter: %w", endpoint, err)
	}
	if plain && !Loopback(host) {
		return arbiter.Errorf(arbiter.BadSpec, "name the directory of keys that ftvmm witness grant made for this side: ?keys=DIR", "the arbiter %s is on another host, and no keys are given for it", endpoint)
	}
	return nil
}

// Loopback reports whether a host is this host by its name or address.
func Loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
