package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/integration/guests/ledger"
	"github.com/ftvmm/ftvmm/mirror/disk"
	"github.com/ftvmm/ftvmm/vmm"
)

const (
	portLedger = 7000
	ledgerDisk = 4 << 20 // bytes
)

// ledgerMachine is the ledger on a disk image, which is made if need be, and a network.
func ledgerMachine(t testing.TB, image string, nic vmm.NIC, cmdline string) *running {
	kernel, err := guests.Image("ledgerd")
	require.NoError(t, err)
	d, err := disk.Open(image, disk.Options{Create: ledgerDisk})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return start(t, vmm.Config{
		Memory: 64 << 20, Kernel: kernel, Cmdline: cmdline, NICs: []vmm.NIC{nic}, Disks: []vmm.Disk{{Backend: d}},
	})
}

// answers are those that several clients got.
type answers struct {
	mu   sync.Mutex
	all  []ledger.Answer
	wait map[int]chan struct{} // by number of answers; closed when there are so many
}

func (a *answers) add(one ledger.Answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, one)
	if c := a.wait[len(a.all)]; c != nil {
		close(c)
	}
}

// reached returns a channel that is closed when there are n answers; it is asked for once.
func (a *answers) reached(n int) <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := make(chan struct{})
	if len(a.all) >= n {
		close(c)
		return c
	}
	if a.wait == nil {
		a.wait = map[int]chan struct{}{}
	}
	a.wait[n] = c
	return c
}

// transact has clients 1 to n each deposit 1, 2, 3, … in its own account and move one of
// it to account 0, until each has had so many answers; it waits for them.
func transact(ctx context.Context, dial dialFunc, n, each int, got *answers) error {
	errs := make(chan error, n)
	for id := 1; id <= n; id++ {
		go func() {
			c := ledger.NewClient(uint32(id), func(ctx context.Context) (net.Conn, error) { return dial(ctx, "tcp", portLedger) })
			defer c.Close()
			c.Timeout = patience // of a broken connection the client learns
			errs <- func() error {
				for i := range each {
					var a ledger.Answer
					var err error
					if i%2 == 0 {
						a, err = c.Deposit(ctx, uint16(id), uint64(1+i/2))
					} else {
						a, err = c.Transfer(ctx, uint16(id), 0, 1)
					}
					if err != nil {
						return fmt.Errorf("client %d: %w", id, err)
					}
					if a.Outcome != ledger.OK {
						return fmt.Errorf("client %d: %v", id, a.Outcome)
					}
					got.add(a)
				}
				return nil
			}()
		}()
	}
	var all error
	for range n {
		all = errors.Join(all, <-errs)
	}
	return all
}

// requireJournal reads the journal from a disk image: it has every answer, each transaction
// exactly once, and the balances that n clients with so many transactions leave.
func requireJournal(t *testing.T, image string, got *answers, n, each int) *ledger.Journal {
	f, err := os.Open(image)
	require.NoError(t, err)
	defer f.Close()
	j, err := ledger.ReadJournal(f)
	require.NoError(t, err)
	require.NoError(t, j.Covers(got.all))
	require.Len(t, got.all, n*each)
	require.Len(t, j.Records, n*each)
	deposits, transfers := uint64((each+1)/2), uint64(each/2)
	require.Equal(t, uint64(n)*transfers, j.State.Balance(0))
	for id := 1; id <= n; id++ {
		require.Equal(t, deposits*(deposits+1)/2-transfers, j.State.Balance(uint16(id)))
	}
	return j
}

// The ledger keeps its promises over both kinds of network: what it has answered is on the
// disk after the power button, and another life of the guest goes on from there.
func TestLedgerKeepsWhatItHasAnswered(t *testing.T) {
	const clients, each = 4, 50
	for _, network := range []string{"user", "tap"} {
		t.Run(network, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "disk")
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			var got answers
			life := func(t *testing.T, use func(t *testing.T, c *ledger.Client, dial dialFunc)) {
				var nic vmm.NIC
				var dial dialFunc
				cmdline := "journal=77"
				if network == "user" {
					nic, dial = onUserNetwork(t, "tcp:7000")
				} else {
					nic, dial = newSpace(t).onTap(true)
					cmdline += " ip=" + spaceGuest + spacePrefix
				}
				m := ledgerMachine(t, image, nic, cmdline)
				m.console.waitFor(t, 0, "ready", patience)
				c := ledger.NewClient(1000, func(ctx context.Context) (net.Conn, error) { return dial(ctx, "tcp", portLedger) })
				use(t, c, dial)
				require.NoError(t, c.Close())
				require.NoError(t, m.PowerButton())
				require.Equal(t, vmm.Exit{Reason: vmm.ExitPowerOff}, m.wait(t), "%s", m.console)
			}
			t.Run("first life", func(t *testing.T) {
				life(t, func(t *testing.T, _ *ledger.Client, dial dialFunc) {
					require.NoError(t, transact(ctx, dial, clients, each, &got))
				})
			})
			j := requireJournal(t, image, &got, clients, each)
			t.Run("second life", func(t *testing.T) {
				life(t, func(t *testing.T, c *ledger.Client, _ dialFunc) {
					seq, hash, err := c.Hash(ctx)
					require.NoError(t, err)
					require.EqualValues(t, clients*each, seq)
					require.Equal(t, j.State.Hash(), hash)
					balance, err := c.Balance(ctx, 0)
					require.NoError(t, err)
					require.Equal(t, j.State.Balance(0), balance)
				})
			})
			requireJournal(t, image, &got, clients, each)
		})
	}
}

// imageVariable names the disk image to the process that [TestLedgerProcess] is.
const imageVariable = "FTVMM_TEST_LEDGER_IMAGE"

// TestLedgerProcess is the ledger in a process of its own, which another test starts and kills. It
// prints the ledger's port and ends with its standard input.
func TestLedgerProcess(t *testing.T) {
	image := os.Getenv(imageVariable)
	if image == "" {
		t.Skip("only for TestLedgerSurvivesTheDeathOfItsProcess")
	}
	nic, dial := onUserNetwork(t, "tcp:7000")
	m := ledgerMachine(t, image, nic, "")
	m.console.waitFor(t, 0, "ready", patience)
	c, err := dial(context.Background(), "tcp", portLedger)
	require.NoError(t, err)
	c.Close()
	_, _ = fmt.Fprintln(os.Stdout, c.RemoteAddr())
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// ledgerProcess starts TestLedgerProcess and returns it with the ledger's address.
func ledgerProcess(t *testing.T, image string) (kill func(), address string) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestLedgerProcess$")
	cmd.Env = append(os.Environ(), imageVariable+"="+image)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		stdin.Close()
	})
	t.Cleanup(kill)
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	host, port, err := net.SplitHostPort(line[:len(line)-1])
	require.NoError(t, err, "the process said %q", line)
	return kill, net.JoinHostPort(host, port)
}

// SIGKILL of the whole program between, before and after answers: with the same disk another
// process goes on, and no answer is lost and no transaction is carried out twice.
func TestLedgerSurvivesTheDeathOfItsProcess(t *testing.T) {
	const clients, each, deaths = 4, 60, 4
	image := filepath.Join(t.TempDir(), "disk")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var address atomic.Pointer[string]
	dial := func(ctx context.Context, network string, _ int) (net.Conn, error) {
		a := address.Load()
		if a == nil {
			return nil, errors.New("between two lives")
		}
		var d net.Dialer
		return d.DialContext(ctx, network, *a)
	}
	var got answers
	done := make(chan error, 1)
	go func() { done <- transact(ctx, dial, clients, each, &got) }()
	for death := 1; death <= deaths; death++ {
		kill, a := ledgerProcess(t, image)
		address.Store(&a)
		select {
		case <-got.reached(clients * each * death / (deaths + 1)):
		case err := <-done:
			t.Fatalf("the clients ended before death %d: %v", death, err)
		}
		kill()
		address.Store(nil)
	}
	kill, a := ledgerProcess(t, image)
	address.Store(&a)
	require.NoError(t, <-done)
	kill()
	requireJournal(t, image, &got, clients, each)
}
