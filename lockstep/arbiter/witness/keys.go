package witness

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/etcd"
	"github.com/ftvmm/ftvmm/lockstep/link"
)

// The files of a witness's own keys, beside [grantsDir].
const (
	authorityFile    = "authority.pem"     // signs the certificates of the witness and of the hosts
	authorityKeyFile = "authority-key.pem" // needed by Grant only
	certificateFile  = "cert.pem"
	keyFile          = "key.pem"
)

const (
	// backdate and lifetime of certificates: hosts whose clocks are off by less than a month still
	// speak to the witness, and the keys outlive its hardware.
	backdate = 30 * 24 * time.Hour
	lifetime = 25 * 365 * 24 * time.Hour
)

// Reasons why a witness cannot be set up or run.
const (
	BadHost     = "bad-host"      // not a name or an address
	BadName     = "bad-name"      // not a pair's name
	KeysExist   = "keys-exist"    // there are keys already
	BadGrant    = "bad-grant"     // a file in the list of grants is none
	NotLoopback = "not-loopback"  // without keys, and for all the world
	NeedsKeys   = "needs-keys"    // without keys, on records that are protected
	DataInUse   = "data-in-use"   // by another witness
	BadListen   = "cannot-listen" // the address is not this host's, or in use
	initRemedy  = "make keys with ftvmm witness init"
	grantRemedy = "choose another directory, or replace the keys with --force"
)

func refuse(reason, remedy, format string, args ...any) error {
	return arbiter.Errorf(reason, remedy, format, args...)
}

// signer is an authority with its key.
type signer struct {
	certificate *x509.Certificate
	key         ed25519.PrivateKey
}

// Init makes the keys of a witness in dir, which must not exist or be empty: an authority, a certificate for the names and
// addresses under which hosts reach it, and an empty list of grants. Only their owner can read them.
func Init(dir string, hosts []string) error {
	if len(hosts) == 0 {
		return refuse(BadHost, "say --host NAME for each name and address under which the hosts of pairs reach it", "no name of the witness is given")
	}
	leaf := template("witness")
	for _, h := range hosts {
		if ip, err := netip.ParseAddr(h); err == nil && ip.Zone() == "" {
			leaf.IPAddresses = append(leaf.IPAddresses, ip.AsSlice())
		} else if isHostName(h) {
			leaf.DNSNames = append(leaf.DNSNames, h)
		} else {
			return refuse(BadHost, "give a name or an IP address, without a port", "%q is no name of a host", h)
		}
	}
	dir = filepath.Clean(dir)
	entries, err := os.ReadDir(dir)
	if err == nil && len(entries) > 0 {
		return refuse(KeysExist, "choose another directory; with new keys, every pair would need new ones", "%s is not empty", dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("making the keys of a witness: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("making the keys of a witness: %w", err)
	}
	fresh, err := os.MkdirTemp(filepath.Dir(dir), ".ftvmm-witness-") // mode 0700
	if err != nil {
		return fmt.Errorf("making the keys of a witness: %w", err)
	}
	defer os.RemoveAll(fresh) // not there any more if all went well
	if err := initialise(fresh, leaf); err != nil {
		return fmt.Errorf("making the keys of a witness: %w", err)
	}
	// A rename replaces a directory only if it is empty: what came in the meantime stays.
	if err := os.Rename(fresh, dir); err != nil {
		return fmt.Errorf("putting the keys of a witness in their place: %w", err)
	}
	return nil
}

// isHostName reports whether a name can be one in the DNS.
func isHostName(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") != "" {
			return false
		}
	}
	return len(name) <= 253
}

func initialise(dir string, leaf *x509.Certificate) error {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	root := template("witness authority")
	root.IsCA, root.BasicConstraintsValid, root.MaxPathLenZero = true, true, true
	root.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, root, root, public, private)
	if err != nil {
		return err
	}
	if root, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	certificate, key, err := signer{root, private}.issue(leaf)
	if err != nil {
		return err
	}
	return errors.Join(
		writePEM(filepath.Join(dir, authorityFile), "CERTIFICATE", der),
		writePEM(filepath.Join(dir, authorityKeyFile), "PRIVATE KEY", secret),
		writePEM(filepath.Join(dir, certificateFile), "CERTIFICATE", certificate),
		writePEM(filepath.Join(dir, keyFile), "PRIVATE KEY", key),
		os.Mkdir(filepath.Join(dir, grantsDir), 0o700),
	)
}

// Grant lets a pair use the witness whose keys are in dir: it makes credentials in out/a and out/b, one for each
// host, and adds the pair to the list of grants, which a witness that runs follows within a second or two. The
// directories may hold the keys of the pair's link already. With force, credentials that were granted before are
// replaced and worth nothing from then on.
func Grant(dir, pair, out string, force bool) error {
	if !link.ValidPairName(pair) {
		return refuse(BadName, "take the guest's name", "%q is no name of a pair: take lower case letters, digits and dashes, a letter first", pair)
	}
	authority, err := loadAuthority(dir)
	if err != nil {
		return err
	}
	listed := filepath.Join(dir, grantsDir, pair)
	files := []string{listed}
	for _, side := range []link.Side{link.A, link.B} {
		for _, name := range []string{etcd.AuthorityFile, etcd.CertificateFile, etcd.KeyFile} {
			files = append(files, filepath.Join(out, side.String(), name))
		}
	}
	for _, path := range files {
		if _, err := os.Lstat(path); err == nil && !force {
			return refuse(KeysExist, grantRemedy, "the pair %s has credentials already: %s exists", pair, path)
		}
	}
	user := userPrefix + rand.Text()
	for _, side := range []link.Side{link.A, link.B} {
		if err := authority.grantSide(filepath.Join(out, side.String()), pair, user, side); err != nil {
			return fmt.Errorf("making the credentials of side %v: %w", side, err)
		}
	}
	// Last, when the new credentials are whole.
	if err := replace(listed, []byte(user+"\n")); err != nil {
		return fmt.Errorf("adding the pair %s to the list of grants: %w", pair, err)
	}
	return nil
}

func (s signer) grantSide(dir, pair, user string, side link.Side) error {
	leaf := template(user)
	leaf.Subject.OrganizationalUnit = []string{pair}
	leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	leaf.URIs = []*url.URL{{Scheme: etcd.Scheme, Opaque: pair + "/" + side.String()}}
	certificate, key, err := s.issue(leaf)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return errors.Join(
		replace(filepath.Join(dir, etcd.AuthorityFile), encode("CERTIFICATE", s.certificate.Raw)),
		replace(filepath.Join(dir, etcd.CertificateFile), encode("CERTIFICATE", certificate)),
		replace(filepath.Join(dir, etcd.KeyFile), encode("PRIVATE KEY", key)),
	)
}

// issue makes a key and signs a certificate for it; both are in DER, the key in PKCS #8.
func (s signer) issue(leaf *x509.Certificate) (certificate, key []byte, err error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	leaf.KeyUsage = x509.KeyUsageDigitalSignature
	if certificate, err = x509.CreateCertificate(rand.Reader, leaf, s.certificate, public, s.key); err != nil {
		return nil, nil, err
	}
	key, err = x509.MarshalPKCS8PrivateKey(private)
	return certificate, key, err
}

func loadAuthority(dir string) (signer, error) {
	pair, err := loadPair(dir, authorityFile, authorityKeyFile)
	if err != nil {
		return signer{}, err
	}
	key, ok := pair.PrivateKey.(ed25519.PrivateKey)
	if !ok {
		return signer{}, refuse(arbiter.BadKeys, initRemedy, "%s is no key of ours", filepath.Join(dir, authorityKeyFile))
	}
	return signer{pair.Leaf, key}, nil
}

func loadPair(dir, certificate, key string) (tls.Certificate, error) {
	c, err := readKey(filepath.Join(dir, certificate), false)
	if err != nil {
		return tls.Certificate{}, err
	}
	k, err := readKey(filepath.Join(dir, key), true)
	if err != nil {
		return tls.Certificate{}, err
	}
	pair, err := tls.X509KeyPair(c, k)
	if err != nil {
		return pair, refuse(arbiter.BadKeys, initRemedy, "the keys of the witness in %s: %w", dir, err)
	}
	return pair, nil
}

// readKey reads a file of the witness's keys.
func readKey(path string, secret bool) ([]byte, error) {
	data, err := etcd.ReadKeyFile(path, secret)
	var known *arbiter.Error
	if errors.As(err, &known) && known.Reason == arbiter.BadKeys && errors.Is(err, fs.ErrNotExist) {
		known.Remedy = initRemedy
	}
	return data, err
}

// credentials reads what the witness proves itself with, and checks hosts with.
func (w *Witness) credentials() (credentials.TransportCredentials, error) {
	own, err := loadPair(w.keys, certificateFile, keyFile)
	if err != nil {
		return nil, err
	}
	authority, err := readKey(filepath.Join(w.keys, authorityFile), false)
	if err != nil {
		return nil, err
	}
	hosts := x509.NewCertPool()
	if !hosts.AppendCertsFromPEM(authority) {
		return nil, refuse(arbiter.BadKeys, initRemedy, "%s holds no certificate", filepath.Join(w.keys, authorityFile))
	}
	return loud{credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{own},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    hosts,
	}), w.log}, nil
}

func template(common string) *x509.Certificate {
	now := time.Now()
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // the reader never fails
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"ftvmm"}, CommonName: common},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(lifetime),
	}
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func writePEM(path, kind string, der []byte) error { return replace(path, encode(kind, der)) }

// replace writes a file whole or not at all; only its owner may read it.
func replace(path string, data []byte) error {
	// A name that begins with a dot is no pair's.
	f, err := os.CreateTemp(filepath.Dir(path), ".new-") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // not there any more if all went well
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
