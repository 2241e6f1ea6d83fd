//! Requests that begin alike share what they have in common: a tree of pieces of text, each of which goes through the
//! model once.

use std::ops::Range;

use super::tokens::Request;

/// A piece that is shared must save at least this many rows of a pass, since a level of the tree costs a pass of its own.
const WORTH_SHARING: usize = 32;

/// A piece of text, and what continues it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// One of the requests that contain the piece.
    pub request: usize,
    /// Positions of the piece among the ids that the model reads.
    pub range: Range<usize>,
    /// All requests that contain the piece, as a range of the order in which the tree was built.
    pub members: Range<usize>,
    pub children: Vec<Node>,
}

impl Node {
    /// Number of texts in which the piece ends, all of which the model must remember at once to score them together.
    pub(crate) fn leaves(&self) -> usize {
        self.children.iter().map(Self::leaves).sum::<usize>().max(1)
    }
}

/// Number of levels of some nodes and what continues them.
fn height(nodes: &[Node]) -> usize {
    nodes.iter().map(|node| 1 + height(&node.children)).max().unwrap_or(0)
}

/// A forest over requests.
#[derive(Debug)]
pub(crate) struct Forest {
    /// Indices of different requests, in the order of their ids; equal ones are represented by the first.
    pub order: Vec<usize>,
    pub roots: Vec<Node>,
}

impl Forest {
    pub(crate) fn new(requests: &[&Request]) -> Self {
        let mut order: Vec<usize> = (0..requests.len()).collect();
        // A request that ends comes before those that continue it.
        order.sort_by(|a, b| {
            let (a, b) = (requests[*a], requests[*b]);
            read(a).cmp(read(b)).then_with(|| a.cmp(b))
        });
        order.dedup_by(|a, b| requests[*a] == requests[*b]);
        let roots = nodes(requests, &order, 0..order.len(), 0);
        Self { order, roots }
    }

    /// Ids that go through the model.
    pub(crate) fn rows(&self) -> usize {
        fn rows(nodes: &[Node]) -> usize {
            nodes.iter().map(|node| node.range.len() + rows(&node.children)).sum()
        }
        rows(&self.roots)
    }

    /// Number of levels.
    pub(crate) fn height(&self) -> usize {
        height(&self.roots)
    }
}

/// What the model reads of a request.
fn read(request: &Request) -> &[u32] {
    &request.ids[..request.ids.len() - 1]
}

/// The pieces from position `depth` on of requests that are equal before it. None of them ends there.
fn nodes(requests: &[&Request], order: &[usize], members: Range<usize>, depth: usize) -> Vec<Node> {
    let path = |member: usize| read(requests[order[member]]);
    let mut found = Vec::new();
    let mut begin = members.start;
    while begin < members.end {
        let first = path(begin);
        let same = (begin..members.end).take_while(|member| path(*member)[depth] == first[depth]).count();
        let group = begin..begin + same;
        begin = group.end;
        // In sorted order, what the first and the last have in common is common to all.
        let last = path(group.end - 1);
        let end = depth + first[depth..].iter().zip(&last[depth..]).take_while(|(a, b)| a == b).count();
        let ending = group.clone().take_while(|member| path(*member).len() == end).count();
        let mut children = nodes(requests, order, group.start + ending..group.end, end);
        let node = |members: Range<usize>, range, children| Node {
            request: order[members.start],
            range,
            members,
            children,
        };
        let branches = children.len() + usize::from(ending > 0);
        if branches == 1 || (end - depth) * (branches - 1) >= WORTH_SHARING {
            found.push(node(group, depth..end, children));
            continue;
        }
        if ending > 0 {
            found.push(node(group.start..group.start + ending, depth..end, Vec::new()));
        }
        for child in &mut children {
            child.range.start = depth;
        }
        found.append(&mut children);
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(ids: &[u32], scored: usize) -> Request {
        Request { ids: ids.to_vec(), scored }
    }

    #[test]
    fn a_long_context_is_shared_and_a_short_one_is_not() {
        let context: Vec<u32> = (0..40).collect();
        let with = |end: &[u32]| request(&[&context, end].concat(), end.len());
        let requests = [with(&[7, 8]), with(&[9]), with(&[7, 5]), with(&[9, 1, 2]), with(&[7, 8])];
        let forest = Forest::new(&requests.iter().collect::<Vec<_>>());
        assert_eq!(forest.order.len(), 4, "equal requests are one");
        let [root] = &forest.roots[..] else { panic!("{:?}", forest.roots) };
        // The single id of `[9]` is not read. `[7, 8]` and `[7, 5]` read the same, and end in the same node.
        assert_eq!((root.range.clone(), root.leaves()), (0..40, 2));
        assert_eq!(
            root.children.iter().map(|child| child.range.clone()).collect::<Vec<_>>(),
            [40..41, 40..42]
        );
        let short = Forest::new(&[&request(&[1, 2, 3, 4], 2), &request(&[1, 2, 5, 4], 2)]);
        assert_eq!(short.roots.iter().map(|node| node.range.clone()).collect::<Vec<_>>(), [0..3, 0..3]);
    }

    /// Spells what the members of a node and of what continues it read.
    fn walk(requests: &[Request], node: &Node, before: &[u32], spelled: &mut Vec<Vec<u32>>) {
        let text = [before, &requests[node.request].ids[node.range.clone()]].concat();
        for member in node.members.clone() {
            spelled[member].clone_from(&text);
        }
        for child in &node.children {
            walk(requests, child, &text, spelled);
        }
    }

    proptest! {
        /// Whatever is shared, each request's ids are read once, in order.
        #[test]
        fn every_path_spells_its_requests(
            texts in prop::collection::vec((prop::collection::vec(0_u32..3, 2..80), 1_usize..3), 1..40),
            common in 0_usize..60,
        ) {
            let requests: Vec<Request> = texts
                .iter()
                .map(|(ids, scored)| request(&[&vec![1; common], &ids[..]].concat(), *scored.min(&(ids.len() - 1))))
                .collect();
            let forest = Forest::new(&requests.iter().collect::<Vec<_>>());
            let mut spelled = vec![Vec::new(); forest.order.len()];
            for root in &forest.roots {
                walk(&requests, root, &[], &mut spelled);
            }
            for (member, text) in spelled.iter().enumerate() {
                prop_assert_eq!(&text[..], read(&requests[forest.order[member]]));
            }
        }
    }
}
