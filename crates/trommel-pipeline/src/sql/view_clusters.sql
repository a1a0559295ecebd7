-- The table `clusters`: the nodes of the tree, and what the corpus holds in each of them (null before `histogram`).
SELECT t.cluster_id, t.parent_id, t.level, s.windows, s.bytes, t.centroid, s.mean_distance, s.top_terms
FROM tree AS t LEFT JOIN cluster_statistics AS s ON s.cluster_id = t.cluster_id
