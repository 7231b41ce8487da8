//go:build sabotage

package protocol

type sabotage struct{ rule Rule }

// Break makes the node break a rule.
func (s *sabotage) Break(r Rule) { s.rule = r }

func (s *sabotage) broken(r Rule) bool { return s.rule == r }
