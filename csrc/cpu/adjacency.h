// Edges sorted by the node that they lead to, checked.
#pragma once
#include "../check.h"

namespace psf {

struct Adjacency {
  std::vector<int64_t> begin, neighbors;  // those of node v: neighbors[begin[v] ...]

  // edges (2, E), contiguous; from_axis: 0 for what reaches a node, 1 for what it reaches.
  Adjacency(const char* op, const Tensor& edges, int64_t nodes, int64_t from_axis) : begin(nodes + 1), neighbors(edges.size(1)) {
    const int64_t E = edges.size(1), *both = edges.const_data_ptr<int64_t>(), *from = both + from_axis * E, *to = both + (1 - from_axis) * E;
    for (int64_t e = 0; e < E; ++e) {
      PSF_CHECK_VALUE(std::min(from[e], to[e]) >= 0 && std::max(from[e], to[e]) < nodes, op, ": edge_index must hold node numbers 0 to ", nodes - 1,
                      ", got ", both[e], " and ", both[E + e], " in column ", e);
      ++begin[to[e] + 1];
    }
    for (int64_t i = 0; i < nodes; ++i) begin[i + 1] += begin[i];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t e = 0; e < E; ++e) neighbors[next[to[e]]++] = from[e];
  }
};

// The graph of every node, from the offsets ptr (B + 1); every edge must join nodes of one graph.
inline std::vector<int64_t> graph_of_nodes(const char* op, const int64_t* ptr, int64_t graphs, int64_t nodes, const Tensor& edges) {
  PSF_CHECK_VALUE(ptr[0] == 0 && ptr[graphs] == nodes, op, ": ptr must rise from 0 to the ", nodes, " nodes, got ", ptr[0], " to ", ptr[graphs]);
  std::vector<int64_t> graph(nodes);
  for (int64_t b = 0; b < graphs; ++b) {
    PSF_CHECK_VALUE(ptr[b] <= ptr[b + 1] && ptr[b + 1] <= nodes, op, ": ptr must rise, got ", ptr[b + 1], " after ", ptr[b]);
    std::fill(graph.begin() + ptr[b], graph.begin() + ptr[b + 1], b);
  }
  const int64_t E = edges.size(1), *u = edges.const_data_ptr<int64_t>(), *v = u + E;
  for (int64_t e = 0; e < E; ++e)
    PSF_CHECK_VALUE(graph[u[e]] == graph[v[e]], op, ": edge_index must join nodes of one graph, got column ", e, " from graph ", graph[u[e]],
                    " to graph ", graph[v[e]]);
  return graph;
}

}  // namespace psf
