package witness

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"

	"github.com/ftvmm/ftvmm/lockstep/arbiter/etcd"
	"github.com/ftvmm/ftvmm/lockstep/link"
)

// grantsDir holds a file for each pair, named after it, with the user that its keys stand for. The user is the
// common name of the certificates and has a random part: keys that were replaced stand for a user that
// is no more.
const grantsDir = "pairs"

// maxGrant bounds such a file, in bytes.
const maxGrant = 128

// userPrefix begins the name of every user, and so none is etcd's administrator, who is called root. What follows is
// [rand.Text].
const userPrefix = "grant-"

// isUser reports whether a name is one that Grant makes.
func isUser(name string) bool {
	text, ok := strings.CutPrefix(name, userPrefix)
	return ok && len(text) == 26 && strings.Trim(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// administrator is the user and the role that etcd asks for. No certificate is ever made in this name.
const administrator = "root"

// grants makes etcd's users and roles what the list of grants says: a user for each pair, and a role of the
// pair's name that may read and write its key.
type grants struct {
	server *etcdserver.EtcdServer
	dir    string
	log    *slog.Logger
	done   map[string]string // what etcd has been told: pair to user
}

// enable switches etcd's access control on, when its data are new.
func (g *grants) enable(ctx context.Context) error {
	if g.server.AuthStore().IsAuthEnabled() {
		return nil
	}
	// An earlier start may have got half of the way.
	users, err := g.server.UserList(ctx, &etcdserverpb.AuthUserListRequest{})
	if err != nil {
		return err
	}
	if !slices.Contains(users.Users, administrator) {
		if _, err := g.server.UserAdd(ctx, &etcdserverpb.AuthUserAddRequest{Name: administrator, Options: &authpb.UserAddOptions{NoPassword: true}}); err != nil {
			return err
		}
	}
	roles, err := g.server.RoleList(ctx, &etcdserverpb.AuthRoleListRequest{})
	if err != nil {
		return err
	}
	if !slices.Contains(roles.Roles, administrator) {
		if _, err := g.server.RoleAdd(ctx, &etcdserverpb.AuthRoleAddRequest{Name: administrator}); err != nil {
			return err
		}
	}
	if _, err := g.server.UserGrantRole(ctx, &etcdserverpb.AuthUserGrantRoleRequest{User: administrator, Role: administrator}); err != nil {
		return err
	}
	_, err = g.server.AuthEnable(ctx, &etcdserverpb.AuthEnableRequest{})
	return err
}

// follow keeps up with the list of grants until ctx is done.
func (g *grants) follow(ctx context.Context) {
	t := time.NewTicker(grantsEvery)
	defer t.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		err := g.sync(ctx)
		switch {
		case err == nil:
			said = ""
		case ctx.Err() == nil && err.Error() != said: // once is enough
			said = err.Error()
			g.log.Error("access stays as it was", "error", said)
		}
	}
}

// sync reads the list and tells etcd what has changed.
func (g *grants) sync(ctx context.Context) error {
	want, err := readGrants(g.dir)
	if err != nil || g.done != nil && maps.Equal(want, g.done) {
		return err
	}
	g.done = nil // if this fails half-way, it is done again
	ctx = g.server.AuthStore().WithRoot(ctx)
	users, err := g.server.UserList(ctx, &etcdserverpb.AuthUserListRequest{})
	if err != nil {
		return err
	}
	roles, err := g.server.RoleList(ctx, &etcdserverpb.AuthRoleListRequest{})
	if err != nil {
		return err
	}
	wanted := map[string]bool{administrator: true}
	for _, pair := range slices.Sorted(maps.Keys(want)) {
		user := want[pair]
		wanted[user] = true
		if !slices.Contains(roles.Roles, role(pair)) {
			if _, err := g.server.RoleAdd(ctx, &etcdserverpb.AuthRoleAddRequest{Name: role(pair)}); err != nil {
				return fmt.Errorf("pair %s: %w", pair, err)
			}
		}
		if _, err := g.server.RoleGrantPermission(ctx, &etcdserverpb.AuthRoleGrantPermissionRequest{
			Name: role(pair), Perm: &authpb.Permission{PermType: authpb.Permission_READWRITE, Key: []byte(etcd.Key(pair))},
		}); err != nil {
			return fmt.Errorf("pair %s: %w", pair, err)
		}
		if slices.Contains(users.Users, user) {
			continue
		}
		if _, err := g.server.UserAdd(ctx, &etcdserverpb.AuthUserAddRequest{Name: user, Options: &authpb.UserAddOptions{NoPassword: true}}); err != nil {
			return fmt.Errorf("pair %s: %w", pair, err)
		}
		if _, err := g.server.UserGrantRole(ctx, &etcdserverpb.AuthUserGrantRoleRequest{User: user, Role: role(pair)}); err != nil {
			return fmt.Errorf("pair %s: %w", pair, err)
		}
		g.log.Info("access granted", "pair", pair, "user", user)
	}
	for _, user := range users.Users {
		if wanted[user] {
			continue
		}
		if _, err := g.server.UserDelete(ctx, &etcdserverpb.AuthUserDeleteRequest{Name: user}); err != nil {
			return err
		}
		g.log.Info("access withdrawn", "user", user)
	}
	g.done = want
	return nil
}

// role returns the name of a pair's role; no pair's is the administrator's.
func role(pair string) string { return "pair-" + pair }

// readGrants reads the list of grants: pair to user.
func readGrants(dir string) (map[string]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading the list of grants: %w", err)
	}
	list := map[string]string{}
	for _, e := range entries {
		if !link.ValidPairName(e.Name()) {
			continue // a file that is being written, or an editor's
		}
		user, err := readGrant(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		list[e.Name()] = user
	}
	return list, nil
}

func readGrant(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("reading a grant: %w", err)
	}
	defer f.Close()
	b := make([]byte, maxGrant)
	n, err := f.Read(b)
	user := strings.TrimSuffix(string(b[:n]), "\n")
	if !isUser(user) {
		return "", refuse(BadGrant, "make it again with ftvmm witness grant --force, or remove the file", "%s is no grant: %w", path, errors.Join(err, errors.New("it names no user")))
	}
	return user, nil
}
