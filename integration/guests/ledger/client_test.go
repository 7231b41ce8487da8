package ledger

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// faults is a ledger whose connections break: the nth request that it gets is answered,
// or what plan[n] says. Beyond the plan all is well.
type faults struct {
	plan  string // 'x': break before executing, 'a': after executing, '2': answer twice, ' ': fine
	n     int
	state *State
	execs int
	done  map[string]string
}

func (f *faults) dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	go f.serve(far)
	return near, nil
}

func (f *faults) serve(c net.Conn) {
	defer c.Close()
	for in := bufio.NewScanner(c); in.Scan(); {
		fault := byte(' ')
		if f.n < len(f.plan) {
			fault = f.plan[f.n]
		}
		f.n++
		if fault == 'x' {
			return
		}
		answer := f.execute(in.Text())
		if fault == 'a' {
			return
		}
		if fault == '2' {
			answer += "\n" + answer
		}
		fmt.Fprintln(c, answer)
	}
}

func (f *faults) execute(line string) string {
	w := strings.Fields(line)
	if answer, ok := f.done[w[1]]; ok {
		return answer
	}
	if w[0] == "B" {
		return "B 5 42"
	}
	var r Record
	r.Op = Op(w[0][0])
	fmt.Sscanf(w[1], "%d.%d", &r.Client, &r.Number)
	fmt.Sscanf(w[2], "%d", &r.From)
	fmt.Sscanf(w[len(w)-2], "%d", &r.To)
	fmt.Sscanf(w[len(w)-1], "%d", &r.Amount)
	if r.From >= Accounts {
		return "ERR " + w[1] + " account"
	}
	f.execs++
	r.Seq = f.state.Seq() + 1
	r.Outcome, r.Balance = f.state.execute(r)
	f.state.seq++
	answer := fmt.Sprintf("OK %s %d %d", w[1], r.Seq, r.Balance)
	if r.Outcome != OK {
		answer = fmt.Sprintf("NO %s %d %v", w[1], r.Seq, r.Outcome)
	}
	f.done[w[1]] = answer
	return answer
}

func TestClientRepeatsUntilAnswered(t *testing.T) {
	for _, c := range []struct {
		name, plan        string
		connects, repeats int
	}{
		{"nothing breaks", "", 1, 0},
		{"broken before execution", "x", 2, 1},
		{"broken after execution", "a", 2, 1},
		{"broken again and again", "xaxxa x", 7, 6},
		{"an answer comes twice", "22", 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &faults{plan: c.plan, state: NewState(0), done: map[string]string{}}
			client := NewClient(7, f.dial)
			client.Timeout, client.Pause = 0, 0
			defer client.Close()
			ctx := context.Background()

			a, err := client.Deposit(ctx, 5, 100)
			require.NoError(t, err)
			require.Equal(t, Answer{Client: 7, Number: 1, Seq: 1, Balance: 100}, a)
			a, err = client.Transfer(ctx, 5, 6, 30)
			require.NoError(t, err)
			require.Equal(t, Answer{Client: 7, Number: 2, Seq: 2, Balance: 70}, a)
			a, err = client.Transfer(ctx, 5, 6, 71)
			require.NoError(t, err)
			require.Equal(t, Answer{Client: 7, Number: 3, Seq: 3, Outcome: Funds}, a)
			require.Equal(t, 3, f.execs, "each executed once")
			require.Equal(t, c.connects, client.Connects)
			require.Equal(t, c.repeats, client.Repeats)

			_, err = client.Deposit(ctx, 5000, 1)
			var refused *RefusedError
			require.ErrorAs(t, err, &refused)
			require.Equal(t, "account", refused.Reason)
			b, err := client.Balance(ctx, 5)
			require.NoError(t, err)
			require.EqualValues(t, 42, b)
		})
	}
}

func TestClientGivesUpWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	client := NewClient(1, func(context.Context) (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			far.Read(make([]byte, 1)) // the request is on its way, and gets no answer
			cancel()
		}()
		return near, nil
	})
	client.Timeout = 0
	_, err := client.Deposit(ctx, 1, 1)
	require.ErrorIs(t, err, context.Canceled)
}

func FuzzParseAnswer(f *testing.F) {
	for _, s := range []string{"OK 1.2 3 4", "NO 1.2 3 funds", "NO 1.2 3 limit", "ERR - syntax", "OK 1.2 0 4", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		a, err := parseAnswer(line)
		if err == nil && a.Seq == 0 {
			t.Fatalf("%q has no place in the journal", line)
		}
	})
}
