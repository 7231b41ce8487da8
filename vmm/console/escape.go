package console

// EscapePrefix is the key that begins a command to ftvmm on a terminal in raw mode: Ctrl-],
// as in telnet. Ctrl-C and all other keys go to the guest.
const EscapePrefix = 0x1d

// The keys after [EscapePrefix]. The prefix twice types it once; another key is ignored.
const (
	KeyQuit  = 'q' // end the VMM ("run") or detach ("vm console")
	KeyPower = 'p' // press the power button ("run")
	KeyHelp  = '?'
)

// Escape takes commands out of what is typed. The zero value is ready.
type Escape struct {
	// OnKey is called for each key that follows the prefix, in the goroutine that reads the terminal.
	OnKey func(key byte)

	pending bool
}

// Filter removes the commands from p, in place, and returns the rest.
func (e *Escape) Filter(p []byte) []byte {
	out := p[:0]
	for _, b := range p {
		switch {
		case e.pending && b == EscapePrefix:
			e.pending = false
			out = append(out, b)
		case e.pending:
			e.pending = false
			if e.OnKey != nil {
				e.OnKey(b)
			}
		case b == EscapePrefix:
			e.pending = true
		default:
			out = append(out, b)
		}
	}
	return out
}
