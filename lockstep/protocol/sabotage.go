package protocol

// Rule is a rule of the protocol that a build with the tag "sabotage" can break, to prove that
// the simulator would notice. In any other build no rule can be broken.
type Rule string

// The rules, named after what breaking them does.
const (
	BidBeforeClose   Rule = "bid-before-close"  // the backup bids and goes on acking
	ReleaseUnacked   Rule = "release-unacked"   // outputs leave at once
	ReleaseUnlisted  Rule = "release-unlisted"  // outputs leave between a join's cut and its swap
	ResumeUnread     Rule = "resume-unread"     // an unanswered bid counts as won
	AssumeSwapped    Rule = "assume-swapped"    // an unanswered swap to "both in sync" counts as done
	AssumeAlone      Rule = "assume-alone"      // a join that fails during its swap counts as undone
	BidUnlisted      Rule = "bid-unlisted"      // a side bids that the record does not list
	BidUndrained     Rule = "bid-undrained"     // the backup bids before it has applied its log
	ColdAnyone       Rule = "cold-anyone"       // anybody may start from its disk
	AckUnapplied     Rule = "ack-unapplied"     // a cut is acked before it is applied
	HearOldLinks     Rule = "hear-old-links"    // messages of closed connections count
	ConfirmFirst     Rule = "confirm-first"     // a release is confirmed before it is done
	IgnoreDivergence Rule = "ignore-divergence" // digests are not compared
	CoalesceMarks    Rule = "coalesce-marks"    // no watermark between kick and completion
)

// Rules are all of them.
var Rules = []Rule{
	BidBeforeClose, ReleaseUnacked, ReleaseUnlisted, ResumeUnread, AssumeSwapped, AssumeAlone, BidUnlisted,
	BidUndrained, ColdAnyone, AckUnapplied, HearOldLinks, ConfirmFirst, IgnoreDivergence, CoalesceMarks,
}
