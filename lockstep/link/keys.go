package link

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The files of one side's keys, in a directory named after the side.
const (
	authorityFile   = "pair.pem" // the authority's certificate, equal on both sides
	certificateFile = "cert.pem"
	keyFile         = "key.pem"
)

const (
	// backdate and lifetime of certificates: hosts whose clocks are off by less than a month still
	// speak to each other, and a pair outlives its hardware.
	backdate = 30 * 24 * time.Hour
	lifetime = 25 * 365 * 24 * time.Hour
	// scheme of the URI in a certificate that names pair and side: "ftvmm-pair:NAME/a".
	scheme = "ftvmm-pair"
	// maxPairName is the longest name of a pair.
	maxPairName = 63
	// maxKeyFile bounds what is read of a key file.
	maxKeyFile = 64 << 10
)

// Fingerprint names a pair's authority, and so the pair: the SHA-256 of its certificate.
type Fingerprint [sha256.Size]byte

// String returns the fingerprint in hexadecimal, in groups that a person can compare.
func (f Fingerprint) String() string {
	var groups []string
	for i := 0; i < len(f); i += 4 {
		groups = append(groups, hex.EncodeToString(f[i:i+4]))
	}
	return strings.Join(groups, "-")
}

// Reasons why keys cannot be made or used.
const (
	BadName        Reason = "bad-name"           // not a pair's name
	KeysExist      Reason = "keys-exist"         // there are keys already
	NotKeys        Reason = "not-keys"           // the directory to be replaced holds other things than keys
	KeysMissing    Reason = "keys-missing"       // a file of the keys is not there
	KeysUnreadable Reason = "keys-unreadable"    // or has not the right contents
	KeysReadable   Reason = "keys-not-protected" // others may read the private key
)

// ValidPairName reports whether s may be a pair's name, which is its guest's: up to 63 lower case letters,
// digits and dashes, a letter first.
func ValidPairName(s string) bool {
	if s == "" || len(s) > maxPairName || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// Keys are what one side of a pair proves itself with.
type Keys struct {
	Pair        string
	Side        Side
	Fingerprint Fingerprint
	NotBefore   time.Time
	NotAfter    time.Time

	authority   *x509.CertPool
	certificate tls.Certificate
}

// CreatePair makes the keys of a pair in dir, which must not exist or be empty: dir/a for one host, dir/b
// for the other. Directories can be read by their owner only, files too. With force, keys that are in dir are
// replaced, and nothing else is. The keys appear all at once, or not at all.
func CreatePair(dir, name string, force bool) (Fingerprint, error) {
	return createPair(dir, name, force, time.Now())
}

func createPair(dir, name string, force bool, now time.Time) (f Fingerprint, err error) {
	if !ValidPairName(name) {
		return f, refuse(BadName, "%q is no name of a pair: take lower case letters, digits and dashes, a letter first", name)
	}
	dir = filepath.Clean(dir)
	if err := checkReplaceable(dir, force); err != nil {
		return f, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return f, fmt.Errorf("make the directory of the keys: %w", err)
	}
	fresh, err := os.MkdirTemp(filepath.Dir(dir), ".ftvmm-pair-") // mode 0700
	if err != nil {
		return f, fmt.Errorf("make the directory of the keys: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(fresh)) }()
	if f, err = writePair(filepath.Join(fresh, "new"), name, now); err != nil {
		return f, err
	}
	// A rename replaces a directory only if it is empty: what came in the meantime stays.
	old := filepath.Join(fresh, "old")
	if force {
		if err := os.Rename(dir, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return f, fmt.Errorf("put the old keys aside: %w", err)
		}
	}
	if err := os.Rename(filepath.Join(fresh, "new"), dir); err != nil {
		if force {
			err = errors.Join(err, os.Rename(old, dir))
		}
		return f, fmt.Errorf("put the keys in their place: %w", err)
	}
	return f, nil
}

// checkReplaceable refuses a directory that must not be replaced.
func checkReplaceable(dir string, force bool) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return refuse(NotKeys, "%s: %w", dir, err)
	}
	if !force {
		return refuse(KeysExist, "%s is not empty", dir)
	}
	for _, e := range entries {
		if e.Name() != A.String() && e.Name() != B.String() || !e.IsDir() {
			return refuse(NotKeys, "%s holds %s, which is no part of a pair's keys", dir, e.Name())
		}
		files, err := os.ReadDir(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		for _, f := range files {
			if n := f.Name(); n != authorityFile && n != certificateFile && n != keyFile {
				return refuse(NotKeys, "%s holds %s, which is no part of a pair's keys", dir, filepath.Join(e.Name(), n))
			}
		}
	}
	return nil
}

// writePair makes the keys of both sides.
func writePair(dir, name string, now time.Time) (f Fingerprint, err error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return f, err
	}
	authority, err := template(name, "pair "+name, now)
	if err != nil {
		return f, err
	}
	authority.IsCA, authority.BasicConstraintsValid = true, true
	authority.MaxPathLenZero = true
	authority.KeyUsage = x509.KeyUsageCertSign
	// private is never written: with it anybody could join the pair.
	authorityDER, err := x509.CreateCertificate(rand.Reader, authority, authority, public, private)
	if err != nil {
		return f, err
	}
	f = sha256.Sum256(authorityDER)
	for _, side := range []Side{A, B} {
		if err := writeSide(filepath.Join(dir, side.String()), name, side, authority, authorityDER, private, now); err != nil {
			return f, fmt.Errorf("make the keys of side %v: %w", side, err)
		}
	}
	return f, nil
}

func writeSide(dir, name string, side Side, authority *x509.Certificate, authorityDER []byte, signer ed25519.PrivateKey, now time.Time) error {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	leaf, err := template(name, fmt.Sprintf("pair %s, side %v", name, side), now)
	if err != nil {
		return err
	}
	leaf.KeyUsage = x509.KeyUsageDigitalSignature
	leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	leaf.URIs = []*url.URL{{Scheme: scheme, Opaque: name + "/" + side.String()}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, authority, public, signer)
	if err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return errors.Join(
		writePEM(filepath.Join(dir, authorityFile), "CERTIFICATE", authorityDER),
		writePEM(filepath.Join(dir, certificateFile), "CERTIFICATE", der),
		writePEM(filepath.Join(dir, keyFile), "PRIVATE KEY", secret),
	)
}

func template(name, common string, now time.Time) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"ftvmm"}, OrganizationalUnit: []string{name}, CommonName: clip(common, 64)},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(lifetime),
	}, nil
}

func writePEM(path, kind string, der []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(pem.Encode(f, &pem.Block{Type: kind, Bytes: der}), f.Sync(), f.Close())
}

// LoadKeys reads the keys of one side from the directory that [CreatePair] made for it.
func LoadKeys(dir string) (*Keys, error) {
	authority, err := readPEM(dir, authorityFile)
	if err != nil {
		return nil, err
	}
	certificate, err := readPEM(dir, certificateFile)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, keyFile)
	if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o077 != 0 {
		return nil, refuse(KeysReadable, "others than the owner may use %s (mode %04o); make it 0600", path, st.Mode().Perm())
	}
	secret, err := readPEM(dir, keyFile)
	if err != nil {
		return nil, err
	}
	k, err := parseKeys(authority, certificate, secret)
	if err != nil {
		return nil, refuse(KeysUnreadable, "the keys in %s: %w", dir, err)
	}
	return k, nil
}

func readPEM(dir, name string) ([]byte, error) {
	path := filepath.Join(dir, name)
	st, err := os.Stat(path)
	if err == nil && st.Size() > maxKeyFile {
		return nil, refuse(KeysUnreadable, "%s is too large to be a key", path)
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, refuse(KeysMissing, "read keys: %w", err)
	}
	if err != nil {
		return nil, refuse(KeysUnreadable, "read keys: %w", err)
	}
	return b, nil
}

func parseKeys(authority, certificate, secret []byte) (*Keys, error) {
	block, _ := pem.Decode(authority)
	if block == nil {
		return nil, errors.New("the pair's certificate is not in PEM")
	}
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the pair's certificate: %w", err)
	}
	pair, err := tls.X509KeyPair(certificate, secret)
	if err != nil {
		return nil, err
	}
	name, side, err := identity(pair.Leaf)
	if err != nil {
		return nil, err
	}
	k := &Keys{
		Pair: name, Side: side, Fingerprint: sha256.Sum256(root.Raw), NotBefore: pair.Leaf.NotBefore, NotAfter: pair.Leaf.NotAfter,
		authority: x509.NewCertPool(), certificate: pair,
	}
	k.authority.AddCert(root)
	// Against its own time: whether it is valid now is for the moment of use.
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: k.authority, CurrentTime: pair.Leaf.NotBefore}); err != nil {
		return nil, err
	}
	return k, nil
}

// identity returns what a certificate says of its owner.
func identity(c *x509.Certificate) (pair string, side Side, err error) {
	for _, u := range c.URIs {
		name, letter, ok := strings.Cut(u.Opaque, "/")
		if u.Scheme != scheme || !ok || !ValidPairName(name) {
			continue
		}
		switch letter {
		case "a":
			return name, A, nil
		case "b":
			return name, B, nil
		}
	}
	return "", 0, errors.New("the certificate names no pair and side")
}

// config returns the settings of TLS for both roles.
func (k *Keys) config(now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		MaxVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{k.certificate},
		Time:         now,
		// Hosts are known by their certificates, not by names, so verify does all of the checking,
		// on both ends and with reasons.
		InsecureSkipVerify: true,
		ClientAuth:         tls.RequireAnyClientCert,
		VerifyConnection:   func(s tls.ConnectionState) error { return k.verify(s.PeerCertificates, now()) },
		// A resumed session would do without the certificates; records that start small and grow
		// would split what is written at once.
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}

// verify decides whether the peer that showed these certificates may speak.
func (k *Keys) verify(chain []*x509.Certificate, now time.Time) error {
	if len(chain) == 0 {
		return refuse(BadCertificate, "the peer shows no certificate")
	}
	leaf := chain[0]
	name, side, err := identity(leaf)
	if err != nil {
		return &Error{Reason: BadCertificate, Err: err}
	}
	if name != k.Pair {
		return refuse(WrongPair, "the peer belongs to the pair %q, this side to %q", name, k.Pair)
	}
	// The time is checked apart, to tell too early from too late.
	_, err = leaf.Verify(x509.VerifyOptions{
		Roots: k.authority, CurrentTime: leaf.NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	switch {
	case err != nil:
		return refuse(Untrusted, "the peer's certificate was not made together with this side's: %w", err)
	case now.Before(leaf.NotBefore):
		return refuse(NotYetValid, "the peer's certificate is valid from %v, and this host's clock says %v", leaf.NotBefore, now)
	case now.After(leaf.NotAfter):
		return refuse(Expired, "the peer's certificate was valid until %v, and this host's clock says %v", leaf.NotAfter, now)
	case side == k.Side:
		return refuse(SameSide, "both hosts hold the keys of side %v", side)
	}
	return nil
}
