package ledger

import (
	"encoding/binary"
	"fmt"
)

// The limits of the guest (ledgerd/journal.h).
const (
	Accounts = 1024      // accounts 0 to Accounts-1
	Clients  = 1024      // different clients that a ledger can know
	Window   = 64        // request numbers a client may have in flight or repeat
	Max      = 1<<63 - 1 // the highest balance, amount and request number
)

// Op is what a request does.
type Op uint8

// The operations, by their letter in the protocol.
const (
	Transfer Op = 'T'
	Deposit  Op = 'D'
)

// Outcome says how an executed request ended. A request that fails so has its place in
// the journal like any other, for it must fail again when it is repeated.
type Outcome uint8

// The outcomes.
const (
	OK    Outcome = 0
	Funds Outcome = 1 // the balance is too small
	Limit Outcome = 2 // the balance would exceed Max
)

// String returns the outcome's word in the protocol.
func (o Outcome) String() string {
	switch o {
	case OK:
		return "ok"
	case Funds:
		return "funds"
	case Limit:
		return "limit"
	}
	return fmt.Sprintf("outcome %d", uint8(o))
}

// Record is one executed request as the journal holds it.
type Record struct {
	Seq     uint64 // 1 for the first
	Client  uint32
	Number  uint64 // of the request, chosen by the client
	Op      Op
	From    uint16 // the account; for Deposit the same as To
	To      uint16
	Amount  uint64
	Outcome Outcome
	Balance uint64 // of From afterwards
	Commit  uint32 // the group in which it was written: 1 for the first
}

type answer struct {
	number, seq, balance, outcome uint64
}

type client struct {
	id, newest uint64
	answers    [Window]answer // of number n at n % Window
}

// State is what a ledger knows: balances and remembered answers. NewState makes an
// empty one.
type State struct {
	seq, chain uint64
	balances   [Accounts]uint64
	clients    []client
}

// NewState returns the state of an empty journal of the given identity.
func NewState(journal uint64) *State { return &State{chain: journal} }

// Seq is the sequence number of the last record applied, 0 if there was none.
func (s *State) Seq() uint64 { return s.seq }

// Balance returns an account's balance, 0 for an account that does not exist.
func (s *State) Balance(account uint16) uint64 {
	if account >= Accounts {
		return 0
	}
	return s.balances[account]
}

// Total returns the sum of all balances, modulo 2^64: what deposits have brought in.
func (s *State) Total() uint64 {
	var total uint64
	for _, b := range s.balances {
		total += b
	}
	return total
}

// Hash returns the hash over the whole state that the guest answers to "H".
func (s *State) Hash() uint64 {
	h := fnvStart.uint64(s.seq).uint64(s.chain)
	for _, b := range s.balances {
		h = h.uint64(b)
	}
	h = h.uint64(uint64(len(s.clients)))
	for i := range s.clients {
		c := &s.clients[i]
		h = h.uint64(c.id).uint64(c.newest)
		for _, a := range c.answers {
			h = h.uint64(a.number).uint64(a.seq).uint64(a.balance).uint64(a.outcome)
		}
	}
	return uint64(h)
}

func (s *State) client(id uint32) *client {
	for i := range s.clients {
		if s.clients[i].id == uint64(id) {
			return &s.clients[i]
		}
	}
	return nil
}

// apply executes the record's request and reports whether it leads to the outcome and
// the balance that the record tells.
func (s *State) apply(r Record, chain uint64) error {
	if r.From >= Accounts || r.To >= Accounts {
		return fmt.Errorf("account %d or %d does not exist", r.From, r.To)
	}
	if r.Op == Deposit && r.From != r.To {
		return fmt.Errorf("deposit to two accounts, %d and %d", r.From, r.To)
	}
	c := s.client(r.Client)
	if c == nil {
		if len(s.clients) == Clients {
			return fmt.Errorf("client %d is one too many", r.Client)
		}
		s.clients = append(s.clients, client{id: uint64(r.Client)})
		c = &s.clients[len(s.clients)-1]
	}
	a := &c.answers[r.Number%Window]
	if r.Number == 0 || a.number == r.Number || r.Number+Window <= c.newest {
		return fmt.Errorf("request %d.%d was executed before or is stale", r.Client, r.Number)
	}
	outcome, balance := s.execute(r)
	if outcome != r.Outcome || balance != r.Balance {
		return fmt.Errorf("request %d.%d gives %v and a balance of %d, recorded are %v and %d",
			r.Client, r.Number, outcome, balance, r.Outcome, r.Balance)
	}
	c.newest = max(c.newest, r.Number)
	*a = answer{r.Number, r.Seq, r.Balance, uint64(r.Outcome)}
	s.seq, s.chain = r.Seq, chain
	return nil
}

func (s *State) execute(r Record) (Outcome, uint64) {
	from, to := &s.balances[r.From], &s.balances[r.To]
	switch {
	case r.Op == Transfer && *from < r.Amount:
		return Funds, *from
	case r.Op == Transfer && r.From == r.To:
	case r.Amount > Max || *to+r.Amount > Max:
		return Limit, *from
	default:
		*to += r.Amount
		if r.Op == Transfer {
			*from -= r.Amount
		}
	}
	return OK, *from
}

// hash64 is a running 64-bit FNV-1a hash. hash/fnv computes the same, but a state has
// hundreds of thousands of words to feed.
type hash64 uint64

const (
	fnvStart hash64 = 0xcbf29ce484222325
	fnvPrime hash64 = 0x100000001b3
)

func (h hash64) bytes(p []byte) hash64 {
	for _, b := range p {
		h = (h ^ hash64(b)) * fnvPrime
	}
	return h
}

func (h hash64) uint64(v uint64) hash64 {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	return h.bytes(b[:])
}
