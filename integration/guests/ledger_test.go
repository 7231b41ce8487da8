package guests

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/guests/ledger"
)

const ledgerPort = 7000

// journalSize makes room for a few thousand groups.
const journalSize = 2 << 20

// startLedger boots the ledger on a disk image.
func startLedger(t *testing.T, disk, cmdline string, weather weather) *wire {
	t.Helper()
	return startNet(t, "ledgerd", "journal=4711 "+cmdline, weather, diskArgs(disk, "", "")...)
}

func (w *wire) ledgerTCP(ctx context.Context) (net.Conn, error) { return w.dialTCP(ctx, ledgerPort) }
func (w *wire) ledgerUDP(context.Context) (net.Conn, error)     { return w.dialUDP(ledgerPort) }

// qmpCommand returns what QEMU's monitor answers.
func (w *wire) qmpCommand(command string) json.RawMessage {
	w.t.Helper()
	conn, err := net.Dial("unix", w.qmp)
	require.NoError(w.t, err)
	defer conn.Close()
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	var answer struct {
		Return json.RawMessage
		Error  any
	}
	require.NoError(w.t, in.Decode(&answer)) // the greeting
	for _, c := range []string{"qmp_capabilities", command} {
		require.NoError(w.t, out.Encode(map[string]string{"execute": c}))
		require.NoError(w.t, in.Decode(&answer))
		require.Nil(w.t, answer.Error)
	}
	return answer.Return
}

// flushes counts the flushes that the first disk has completed.
func (w *wire) flushes() uint64 {
	w.t.Helper()
	var disks []struct {
		Stats struct {
			Flushes uint64 `json:"flush_operations"`
		}
	}
	require.NoError(w.t, json.Unmarshal(w.qmpCommand("query-blockstats"), &disks))
	return disks[0].Stats.Flushes
}

// powerDown presses the power button and waits for the end.
func (w *wire) powerDown() {
	w.t.Helper()
	w.qmpCommand("system_powerdown")
	require.Equal(w.t, 0, w.end(), "power-off: %s", w.output())
	require.Contains(w.t, w.output(), "\nend by power button\n")
}

func readJournal(t *testing.T, disk string) *ledger.Journal {
	t.Helper()
	f, err := os.Open(disk)
	require.NoError(t, err)
	defer f.Close()
	j, err := ledger.ReadJournal(f)
	require.NoError(t, err)
	return j
}

// TestLedgerProtocol is a conversation; the answers to one line of requests come in its order.
func TestLedgerProtocol(t *testing.T) {
	w := startLedger(t, emptyDisk(t, journalSize), "", weather{})
	c := w.tcp(ledgerPort)
	in := bufio.NewReader(c)
	for _, exchange := range []struct{ request, answer string }{
		{"B 5", "B 5 0"},
		{"D 1.1 5 100", "OK 1.1 1 100"},
		{"T 1.2 5 6 30", "OK 1.2 2 70"},
		{"T 1.2 5 6 30", "OK 1.2 2 70"},
		{"T 1.2 9 9 9", "OK 1.2 2 70"}, // the number alone says that it is a repetition
		{"T 1.3 5 6 71", "NO 1.3 3 funds"},
		{"D 1.4 5 1", "OK 1.4 4 71"},
		{"T 1.3 5 6 71", "NO 1.3 3 funds"},
		{"T 1.5 5 5 71", "OK 1.5 5 71"},
		{"T 1.6 5 5 72", "NO 1.6 6 funds"},
		{"D 4294967295.9223372036854775807 1023 9223372036854775807", "OK 4294967295.9223372036854775807 7 9223372036854775807"},
		{"D 2.1 1023 1", "NO 2.1 8 limit"},
		{"T 2.2 5 1023 1", "NO 2.2 9 limit"},
		{"D 1.100 1 1", "OK 1.100 10 1"},
		{"D 1.50 1 1", "OK 1.50 11 2"}, // 1.37 to 1.99 are still in the window
		{"D 1.36 1 1", "ERR 1.36 stale"},
		{"D 1.2 1 1", "ERR 1.2 stale"},
		{"B 1", "B 1 2"},
		{"B 1023", "B 1023 9223372036854775807"},
		{"B 1024", "ERR - account"},
		{"D 1.101 1024 1", "ERR 1.101 account"},
		{"T 1.101 1 65535 1", "ERR 1.101 account"},
		{"D 1.101 1 0", "ERR - syntax"},
		{"D 1.101 1 9223372036854775808", "ERR - syntax"},
		{"D 1.101 1 1 ", "ERR - syntax"},
		{"D 1.101  1 1", "ERR - syntax"},
		{"D 0.1 1 1", "ERR - syntax"},
		{"D 1.0 1 1", "ERR - syntax"},
		{"D 4294967296.1 1 1", "ERR - syntax"},
		{"D 1.1", "ERR - syntax"},
		{"", "ERR - syntax"},
		{"HH", "ERR - syntax"},
		{"D 1.101 1 1\r", "OK 1.101 12 3"},
	} {
		_, err := fmt.Fprintf(c, "%s\n", exchange.request)
		require.NoError(t, err)
		answer, err := in.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, exchange.answer+"\n", answer, "to %q", exchange.request)
	}
	// The same in one piece: one datagram in, one out.
	u, err := w.dialUDP(ledgerPort)
	require.NoError(t, err)
	defer u.Close()
	require.NoError(t, u.SetDeadline(time.Now().Add(runLimit)))
	_, err = fmt.Fprintf(u, "T 1.2 5 6 30\nD 3.1 7 1\nB 7\nnonsense\nB 8")
	require.NoError(t, err)
	got := make([]byte, 2000)
	n, err := u.Read(got)
	require.NoError(t, err)
	require.Equal(t, "ERR 1.2 stale\nOK 3.1 13 1\nB 7 1\nERR - syntax\n", string(got[:n]), "and the line without an end is none")

	long := w.tcp(ledgerPort)
	_, err = long.Write([]byte(strings.Repeat("x", 1000)))
	require.NoError(t, err)
	_, err = long.Read(got)
	require.ErrorContains(t, err, "reset", "a line without end is not our protocol")
}

// TestLedgerLimits fills the table of clients and the journal.
func TestLedgerLimits(t *testing.T) {
	disk := emptyDisk(t, (8+3)*SectorSize) // three groups
	w := startLedger(t, disk, "", weather{})
	c := ledger.NewClient(1, w.ledgerTCP)
	defer c.Close()
	for n := range uint64(3) {
		a, err := c.Deposit(t.Context(), 1, 10)
		require.NoError(t, err)
		require.Equal(t, n+1, a.Seq)
	}
	var refused *ledger.RefusedError
	_, err := c.Deposit(t.Context(), 1, 10)
	require.ErrorAs(t, err, &refused)
	require.Equal(t, "full", refused.Reason)
	b, err := c.Balance(t.Context(), 1)
	require.NoError(t, err)
	require.EqualValues(t, 30, b)
	w.powerDown()
	require.Len(t, readJournal(t, disk).Records, 3)

	w = startLedger(t, emptyDisk(t, journalSize), "", weather{})
	conn := w.tcp(ledgerPort)
	go func() {
		for client := 1; client <= ledger.Clients+1; client++ {
			fmt.Fprintf(conn, "D %d.1 1 1\n", client)
		}
	}()
	in := bufio.NewScanner(conn)
	for client := 1; client <= ledger.Clients; client++ {
		require.True(t, in.Scan())
		require.Equal(t, fmt.Sprintf("OK %d.1 %d %d", client, client, client), in.Text())
	}
	require.True(t, in.Scan())
	require.Equal(t, fmt.Sprintf("ERR %d.1 clients", ledger.Clients+1), in.Text())
}

// load is a number of clients at work on one ledger.
type load struct {
	mu      sync.Mutex
	answers []ledger.Answer
	clients []*ledger.Client
}

func newLoad(w *wire, clients int, firstNumber uint64) *load {
	l := &load{}
	for i := range clients {
		dial := w.ledgerTCP
		if i%2 == 1 {
			dial = w.ledgerUDP
		}
		c := ledger.NewClient(uint32(i+1), dial)
		c.SkipTo(firstNumber)
		c.Timeout = 5 * time.Second
		if i%2 == 1 {
			c.Timeout = 100 * time.Millisecond
		}
		l.clients = append(l.clients, c)
	}
	return l
}

// run has each client do n deposits and transfers, or as many as it can until ctx ends.
func (l *load) run(ctx context.Context, n int) error {
	errs := make([]error, len(l.clients))
	var wg sync.WaitGroup
	for i, c := range l.clients {
		wg.Go(func() {
			defer c.Close()
			account := uint16(i)
			for k := range n {
				var a ledger.Answer
				var err error
				if k%3 == 0 {
					a, err = c.Deposit(ctx, account, 100)
				} else {
					a, err = c.Transfer(ctx, account, uint16(k%10), 60)
				}
				if err != nil {
					errs[i] = err
					return
				}
				l.mu.Lock()
				l.answers = append(l.answers, a)
				l.mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// TestLedgerKeepsEveryAnswer runs clients in bad weather, switches the guest off by its button,
// reads the disk, and finds the same state after a restart.
func TestLedgerKeepsEveryAnswer(t *testing.T) {
	disk := emptyDisk(t, journalSize)
	w := startLedger(t, disk, "", weather{lose: 10, double: 10, swap: 10, seed: 3})
	const clients, each = 6, 40
	l := newLoad(w, clients, 1)
	require.NoError(t, l.run(t.Context(), each))
	require.Len(t, l.answers, clients*each)

	asks := ledger.NewClient(100, w.ledgerTCP)
	asks.Timeout = 5 * time.Second
	seq, hash, err := asks.Hash(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, clients*each, seq, "each request was applied once")
	stats, err := asks.Stats(t.Context())
	require.NoError(t, err)
	require.Equal(t, seq, stats["seq"])
	require.GreaterOrEqual(t, w.flushes(), stats["commits"], "every group was flushed")
	require.Positive(t, stats["commits"])
	asks.Close()
	w.powerDown()

	j := readJournal(t, disk)
	require.EqualValues(t, 4711, j.ID)
	require.Len(t, j.Records, clients*each)
	require.NoError(t, j.Covers(l.answers))
	require.Equal(t, hash, j.State.Hash(), "guest and host agree on the whole state")

	w = startLedger(t, disk, "legacy=1 irq=intx", weather{})
	require.Contains(t, w.output(), fmt.Sprintf("ok journal %d records replayed\n", clients*each))
	again := ledger.NewClient(1, w.ledgerTCP)
	defer again.Close()
	seq2, hash2, err := again.Hash(t.Context())
	require.NoError(t, err)
	require.Equal(t, []uint64{seq, hash}, []uint64{seq2, hash2})
	for _, old := range l.answers { // still remembered
		if old.Client == 1 && old.Number == each {
			again.SkipTo(each)
			a, err := again.Deposit(t.Context(), 0, 1)
			require.NoError(t, err)
			require.Equal(t, old, a)
		}
	}
	w.powerDown()
	require.Len(t, readJournal(t, disk).Records, clients*each)
}

// TestLedgerSurvivesItsDeath kills QEMU in the middle of the work, again and again.
func TestLedgerSurvivesItsDeath(t *testing.T) {
	disk := emptyDisk(t, journalSize)
	var answers []ledger.Answer
	for life := range uint64(3) {
		w := startLedger(t, disk, "", weather{})
		if life > 0 {
			j := readJournal(t, disk)
			require.Contains(t, w.output(), fmt.Sprintf("state seq %d hash %016x\n", j.State.Seq(), j.State.Hash()))
		}
		ctx, cancel := context.WithCancel(t.Context())
		l := newLoad(w, 4, 1+1000*life)
		worked := make(chan error, 1)
		go func() { worked <- l.run(ctx, 1000) }()
		require.Eventually(t, func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return len(l.answers) > 100
		}, runLimit, time.Millisecond, "%s", w.output())
		w.kill()
		cancel()
		require.Error(t, <-worked, "there was work left")
		answers = append(answers, l.answers...)
		j := readJournal(t, disk)
		require.NoError(t, j.Covers(answers))
		require.GreaterOrEqual(t, len(j.Records), len(answers))
	}
}

// TestLedgerRefusesStrangeDisks leaves a disk alone that holds something else.
func TestLedgerRefusesStrangeDisks(t *testing.T) {
	for name, content := range map[string]string{"junk": "MZ, or whatever", "damage": "FTLEDGER"} {
		disk := emptyDisk(t, journalSize)
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		require.NoError(t, err)
		_, err = f.WriteString(content)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		before, err := os.ReadFile(disk)
		require.NoError(t, err)
		q := newQEMU(t, tcg, append(diskArgs(disk, "", ""), "-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n")...)
		out, code := q.run(t, "-kernel", kernel(t, "ledgerd"))
		require.Equal(t, 3, code, "%s: %s", name, out)
		require.Contains(t, out, "FAIL journal the disk holds something else\n")
		after, err := os.ReadFile(disk)
		require.NoError(t, err)
		require.Equal(t, before, after)
	}
}
